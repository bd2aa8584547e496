"""Which of the checkpoints that are out are kept from the trainer's rotation, by second names, until they have been evaluated."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from assayer import second_names
from assayer.client.pending import Job
from assayer.files import printable
from assayer.kept import Kept, left_by, sweep
from assayer.record import hold_folder

__all__ = ["Keeping"]

logger = logging.getLogger(__name__)


class Keeping:
    """Keeps ``count`` checkpoints at most, while the part ``min_free`` of their file system is free.

    ``owner`` is the file of pending evaluations. What was submitted under its second name is kept until it has ended; what was not gives
    way to what is newer.
    """

    def __init__(self, owner: Path, count: int, min_free: float) -> None:
        self.owner = str(owner)
        self._count = count
        self._min_free = min_free
        self._kept: dict[str, Kept] = {}
        self._said: set[str] = set()
        self._is_refused = False

    def take_over(self, jobs: Iterable[Job]) -> None:
        """What an earlier training has kept: of jobs that are out it stays, else it is taken away."""
        out = {Kept.of(job.checkpoint, self.owner, job.key).folder: job for job in jobs if job.is_out}
        folders = {Path(self.owner).parent / ".hold"} | {hold_folder(Path(job.checkpoint)) for job in jobs}
        for folder in folders:
            sweep(folder)
        for one in (one for folder in folders for one in left_by(self.owner, folder)):
            if one.folder in out:
                self._kept[out[one.folder].key] = one
            else:
                one.release()

    def keep(self, job: Job, jobs: Mapping[str, Job]) -> bool:
        """Keeps the checkpoint of a job that is to be submitted, as it is by now; True when it is kept.

        Args:
            job: one of ``jobs``.
            jobs: all, by key.
        """
        one = self._kept.get(job.key) or Kept.of(job.checkpoint, self.owner, job.key)
        try:
            if job.key not in self._kept and not self._has_room(job, jobs):
                return False
            if one.keep():
                self._kept[job.key] = one
                return True
        except OSError as error:
            self._is_refused = second_names.is_refusal(error)
            self._say(f"hard links cannot be made in {printable(str(one.folder.parent))} ({error.strerror})")
        except ValueError:
            # No path at all: whoever evaluates it says so.
            return False
        return False

    def _has_room(self, job: Job, jobs: Mapping[str, Job]) -> bool:
        if self._count == 0 or self._is_refused:
            return False
        folder = hold_folder(Path(job.checkpoint)).parent.parent
        if second_names.free_part(str(folder)) < self._min_free:
            self._say(f"less than {self._min_free:.0%} of the file system of {printable(str(folder))} is free")
            return False
        # By step, too: a path may be saved again and again, and each time what is kept of it is another checkpoint.
        saves = {key: (jobs[key].step, one.checkpoint) for key, one in self._kept.items()}
        if (job.step, job.checkpoint) in saves.values() or len(set(saves.values())) < self._count:
            return True
        # What was never submitted gives way to what is newer, the oldest first.
        sent = {save for key, save in saves.items() if jobs[key].path}
        oldest = min((save for save in saves.values() if save not in sent), default=None)
        if oldest is None or oldest[0] >= job.step:
            return False
        logger.info("%s of step %d is not kept from the trainer's rotation any more: newer ones are", printable(oldest[1]), oldest[0])
        for key in [key for key, save in saves.items() if save == oldest]:
            self.release(key)
        return True

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.warning("%s: what waits is not kept from the trainer's rotation", why)

    def has_earlier(self, job: Job) -> bool:
        """True when what is kept for a job is not what lies at its path by now, so that it is still the weights of its step."""
        one = self._kept.get(job.key)
        return one is not None and not one.is_the_same

    def path(self, job: Job) -> str:
        """Under which name a job's checkpoint is to be submitted."""
        one = self._kept.get(job.key)
        return one.path if one else job.checkpoint

    def release(self, key: str) -> None:
        """Takes away what was kept for this job."""
        one = self._kept.pop(key, None)
        if one:
            one.release()

    def forget(self, key: str) -> None:
        """Leaves what was kept for this job to whoever evaluates it, or to the next training."""
        self._kept.pop(key, None)
