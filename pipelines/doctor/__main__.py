"""`python -m pipelines.doctor CONFIG`: what is wrong with the images, as a page, as JSON, and as a list to leave out."""

from __future__ import annotations

from pathlib import Path

from pipelines.common.command_line import ConfigParser, print_config
from pipelines.common.errors import UserError, run_command
from pipelines.doctor.examine import examine
from pipelines.doctor.findings import find
from pipelines.doctor.report import EXCLUDE, PAGE, write_report
from pipelines.prepare.build import PrepareConfig, choose, load_data, subset_seed


def main() -> None:
    """The command."""
    parser = ConfigParser(
        prog="python -m pipelines.doctor",
        usage="%(prog)s CONFIG [--out FOLDER] [--field value ...]",
        description="Look for what ruins a long tail: duplicates, leaks between splits, wrong labels, odd images.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("doctor"), help="folder of the report; an earlier one is replaced (doctor)"
    )
    name, arguments, overrides = parser.split()
    if parser.helped(PrepareConfig, name, "quickstart", arguments, overrides):
        return
    if name is None:
        raise UserError(f"name a configuration first: {parser.prog} folder --data.source.path FOLDER")
    config = load_data(name, overrides)
    if arguments.print_config:
        print_config(config)
        return
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: is a file; name a folder")
    # A listed file that is missing is a finding, as an image that cannot be read is.
    data = config.data.model_copy(update={"on_bad_image": "skip"})
    classes, splits = choose(data.source.open(), data, subset_seed(data, config.seed))
    examined = examine(classes, splits, data)
    findings = find(examined)
    write_report(arguments.out, examined, findings, data)
    for finding in findings:
        print(f"{finding.severity + ':':<7}{finding.title}")
    if not findings:
        print("nothing was found")
    excluded = len({number for finding in findings for number in finding.exclude})
    print(f"page: {arguments.out / PAGE}")
    if excluded:
        print(f"{excluded:,} images to leave out: --data.exclude {arguments.out / EXCLUDE}")


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train,data]'")
