from assayer import cli
from assayer.results.command import main

if __name__ == "__main__":
    cli.run(main, "python -m assayer.results")
