"""`python -m benchmarks.resident`: the mode `resident` of `python -m benchmarks.train`."""

from benchmarks import train
from pipelines.common.errors import run_command


def main() -> None:
    train.main("resident")


if __name__ == "__main__":
    run_command(main)
