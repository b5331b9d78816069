"""`python -m cibl_ray.tune SWEEP [--field value ...]`: search for the trade-off between head and tail with Ray Tune.

SWEEP is a sweep file or the name of a shipped one (sweeps/tail_skew). Optuna proposes trials, ASHA stops those that are
behind, and every trial is a run folder under SWEEP_FOLDER/trials. The search keeps a journal of JSON lines; nothing is
unpickled to resume. The result: trials.csv, best.yaml (ready to train), best.safetensors (ready to evaluate), pictures.
"""

# PYTHON_ARGCOMPLETE_OK: a shell may ask how the line goes on
from __future__ import annotations

import time
from pathlib import Path

from cibl_ray.cluster.environment import configure_ray_env
from cibl_ray.run.folder import same_name
from pipelines.common.command_line import ConfigParser, print_config
from pipelines.common.errors import UserError, run_command
from pipelines.common.words import plural


def main() -> None:
    """The command."""
    parser = ConfigParser(
        "cibl_ray.tuning.config:SweepConfig",
        "sweeps",
        prog="python -m cibl_ray.tune",
        usage="%(prog)s SWEEP [--name NAME] [--field value ...]\n"
        "       %(prog)s --resume FOLDER\n"
        "       %(prog)s [SWEEP] --help [PART]",
        description=__doc__,
    )
    parser.add_argument("--name", help="of the sweep folder; by default the sweep's name and the time")
    parser.add_argument("--sweeps", type=Path, help="folder for sweep folders (default: runs)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="resume the sweep in this folder")
    parser.add_argument("--address", help="of a Ray cluster, or 'auto'; by default one is started on this machine")
    name, arguments, overrides = parser.split()
    if parser.helped(name, "sweeps/tail_skew", arguments, overrides):
        return
    if (name is None) == (arguments.resume is None):
        raise UserError("name a sweep first (sweeps/tail_skew, say) to start one, or --resume FOLDER to continue one")
    if arguments.resume is not None and arguments.name is not None:
        same_name(arguments.name, str(arguments.resume))
    if arguments.resume is not None and arguments.sweeps is not None:
        raise UserError(f"--resume continues in {arguments.resume} itself; leave --sweeps out")
    from cibl_ray.tuning.folder import need_new, read_sweep
    from cibl_ray.tuning.sweep import load_sweep

    base = None
    if arguments.resume is not None:
        folder = arguments.resume.absolute()
        if overrides:
            raise UserError(f"{overrides[0]}: a resumed sweep keeps its settings; start a new one to change them")
        sweep, base = read_sweep(folder)
    else:
        assert name is not None
        sweep = load_sweep(name, overrides)
        folder = (
            (arguments.sweeps or Path("runs")) / (arguments.name or f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
        ).absolute()
        need_new(folder)
    if arguments.print_config:
        print_config(sweep)
        return
    configure_ray_env(own=arguments.address is None)
    from cibl_ray.tuning.run import run

    trials, front = run(sweep, folder, arguments.address, base)
    states = {state: sum(trial.state == state for trial in trials) for state in ("completed", "stopped", "failed")}
    print(f"\n{plural(len(trials), 'trial')}: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    print(f"\nThe front, validation, in %:\n\n{front}\n")
    pictures = [name for name in ("trade_off.png", "tail_skew.png") if (folder / name).exists()]
    print(f"Sweep folder: {folder}\n              trials.csv, best.yaml, best.safetensors, {', '.join(pictures)}")


if __name__ == "__main__":
    run_command(main, "'cibl-ray[train,cluster]'")
