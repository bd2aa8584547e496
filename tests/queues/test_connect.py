"""Which Redis is meant, and what is said when none answers."""

from pathlib import Path

import pytest

from assayer.errors import RedisError, UsageError
from assayer.queues.connect import connect, target, without_password


def test_flags_come_before_the_environment_and_the_embedded_server_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAYER_REDIS_URL", "redis://from-environment:1/0")
    assert target("redis://from-flag:2/0", None, None, tmp_path).url == "redis://from-flag:2/0"
    assert target(None, "h", None, tmp_path).url == "redis://h:6379/0"
    assert target(None, None, 7, tmp_path).url == "redis://localhost:7/0"
    assert target(None, "::1", 7, tmp_path).url == "redis://[::1]:7/0"
    assert target(None, None, None, tmp_path).url == "redis://from-environment:1/0"
    monkeypatch.delenv("ASSAYER_REDIS_URL")
    assert target(None, None, None, tmp_path).embedded


@pytest.mark.parametrize("url", ["http://h:1", "localhost:6379", "redis://", "unix://", "redis://h:port"])
def test_what_is_no_redis_url_says_what_is(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="URL"):
        target(url, None, None, tmp_path)


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    url = "redis://user:secret@127.0.0.1:1/0"
    assert without_password(url) == "redis://127.0.0.1:1/0"
    assert "secret" not in target(url, None, None, tmp_path).name
    with pytest.raises(RedisError, match=r"no Redis answers at redis://127\.0\.0\.1:1/0") as caught:
        connect(url, patience=1)
    assert "secret" not in str(caught.value)


def test_two_ways_to_name_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="either"):
        target("redis://h:1", "h", None, tmp_path)
