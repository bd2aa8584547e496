from assayer import cli
from assayer.watch.command import main

if __name__ == "__main__":
    cli.run(main, "python -m assayer.watch")
