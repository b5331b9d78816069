"""`python -m benchmarks.train_step`: the mode `train_step` of `python -m benchmarks.train`."""

from benchmarks import train
from pipelines.common.errors import run_command


def main() -> None:
    train.main("train_step")


if __name__ == "__main__":
    run_command(main)
