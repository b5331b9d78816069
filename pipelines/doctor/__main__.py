"""`python -m pipelines.doctor CONFIG`: what is wrong with the images, as a page, as JSON, and as a list to leave out."""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import sys
from pathlib import Path

from pipelines.common.command_line import ConfigParser
from pipelines.common.errors import run_command
from pipelines.common.files import need_writable
from pipelines.common.words import plural
from pipelines.doctor.content import find_by_content
from pipelines.doctor.examine import examine
from pipelines.doctor.features import image_features, installed
from pipelines.doctor.findings import find, worst_first
from pipelines.doctor.report import EXCLUDE, PAGE, SUSPECTS, write_report
from pipelines.prepare.command import from_command_line
from pipelines.prepare.splits import choose, subset_seed

_MISSING = "for that, pip install 'cibl-ray[train,photos]'"


def main() -> None:
    """The command."""
    parser = ConfigParser(
        "pipelines.prepare.command:PrepareConfig",
        prog="python -m pipelines.doctor",
        usage="%(prog)s CONFIG [--out FOLDER] [--features none] [--field value ...]",
        description="Look for what ruins a long tail: duplicates, leaks between splits, wrong labels, odd images.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("doctor"), help="folder of the report; an earlier one is replaced (doctor)"
    )
    parser.add_argument(
        "--features",
        choices=("auto", "none"),
        default="auto",
        help="auto: look for wrong labels and classes that look alike, by a pretrained network where it is installed; "
        "none: do without, in a fraction of the time (auto)",
    )
    asked = from_command_line(parser, "folder --data.source.path FOLDER")
    if asked is None:
        return
    config, arguments = asked
    need_writable(arguments.out, f"--out {arguments.out}", "name another folder")
    # A listed file that is missing is a finding, as an image that cannot be read is.
    data = config.data.model_copy(update={"on_bad_image": "skip"})
    classes, splits = choose(data.source.open(), data, subset_seed(data, config.seed))
    examined = examine(classes, splits, data)
    found = find(examined)
    if arguments.features == "none":
        pass
    elif installed():
        found += find_by_content(examined, image_features(examined, data))
    else:
        print(f"doctor: likely wrong labels are not looked for; {_MISSING}", file=sys.stderr)
    findings = worst_first(found)
    write_report(arguments.out, examined, findings, data)
    for finding in findings:
        print(f"{finding.severity + ':':<7}{finding.title}")
    if not findings:
        print("nothing was found")
    excluded = len({number for finding in findings for number in finding.exclude})
    print(f"page: {arguments.out / PAGE}")
    if excluded:
        print(f"{plural(excluded, 'image')} to leave out: --data.exclude {arguments.out / EXCLUDE}")
    suspects = sum(len(finding.suspects) for finding in findings)
    if suspects:
        print(f"{plural(suspects, 'label')} to look at: {arguments.out / SUSPECTS}")


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train,data]'")
