"""A bundle's model card and its picture of the head-tail trade-off after training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.common.fonts import save
from pipelines.common.words import plural
from pipelines.prepare.pictures import COLORS
from pipelines.prepare.shots import GROUPS

if TYPE_CHECKING:
    from cibl_ray.evaluation.metrics import Scores

_THIRDS = {"head": COLORS["many"], "middle": COLORS["medium"], "tail": COLORS["few"]}


def save_tail_shift(path: Path, shifted: dict[float, Scores], split: str, default: float) -> None:
    """Draw the accuracy of the largest, middle and smallest third of the classes over the tail shift.

    Args:
        path: The picture.
        shifted: Tail shift, counted from the trained network, to scores.
        split: Where they were measured.
        default: The bundle's own shift: a client's is added to it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    shifts = [shift - default for shift in shifted]
    for third, color in _THIRDS.items():
        values = [getattr(scores, third) for scores in shifted.values()]
        if None not in values:
            axes.plot(shifts, [100 * value for value in values], color=color, marker="o", label=f"{third} third of the classes")
    overall = [100 * scores.overall for scores in shifted.values()]
    axes.plot(shifts, overall, color="#333333", linestyle="--", marker=".", label="overall")
    axes.set(xlabel="tail_shift", ylabel=f"accuracy on {split}, %", ylim=(0, 100), title="The trade-off after training")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def write_model_card(path: Path, manifest: dict[str, Any], sizes: dict[str, int]) -> None:
    """Write Markdown for people: what the model is, how it was measured, how it is used, where it fails.

    Args:
        path: The file.
        manifest: The bundle's.
        sizes: Precision to bytes of its file.
    """
    counts, classes = manifest["train_counts"], manifest["classes"]
    worst = manifest["accuracy"]["fp32"]["worst"]
    thirds = ("overall", "head", "middle", "tail")
    source, split, default = manifest["source"], manifest["split"], manifest["default_tail_shift"]
    groups = ", ".join(f"{manifest['groups'].count(group)} {group}-shot" for group in GROUPS if group in manifest["groups"])
    lines = [
        f"# {manifest['name']}",
        "",
        f"An image classifier for {len(classes)} classes ({groups}), trained on {sum(counts):,} long-tailed images: "
        f"{max(counts):,} of the most common class, {min(counts):,} of the rarest.",
        "",
        "![Training images of each class](class_counts.png)",
        "",
        "## Accuracy",
        "",
        f"Percent, measured with onnxruntime ({manifest['provider']}) on {manifest['accuracy']['fp32']['samples']:,} images "
        f"of the {split} split. Many: more than 100 training images; medium: 20 to 100; few: fewer than 20; "
        "thirds: of the classes by size.",
        "",
        *([f"**{source['images'][0].upper()}{source['images'][1:]}.**", ""] if source.get("images") else []),
        "| precision | overall | many | medium | few | head third | middle | tail third | worst class | size |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("overall", "many", "medium", "few", "head", "middle", "tail", "worst")
    for precision, figures in manifest["accuracy"].items():
        cells = [_percent(figures[name]) for name in names]
        lines.append(f"| {precision} | {' | '.join(cells)} | {sizes[precision] / 1e6:.2f} MB |")
    lines += [
        *_float_lines(source.get("int8")),
        "",
        "`tail_shift` moves the answers along the head-tail trade-off, without training again "
        f"(logits − tail_shift · log prior).{_own_shift(default)}",
        "",
        "| tail_shift | overall | head third | middle | tail third |",
        "|---|---|---|---|---|",
        *(
            f"| {float(shift) - default:g} | {' | '.join(_percent(row[name]) for name in thirds)} |"
            for shift, row in manifest["tail_shift"].items()
        ),
        "",
        "![Accuracy over tail_shift](tail_shift.png)",
        "",
        f"These rows are of the {split} images: to choose a shift for your own use, measure on images set aside for that.",
        "",
        "## Use",
        "",
        "```bash",
        "python -m serve BUNDLE                                   # HTTP on 127.0.0.1:8000",
        "curl --data-binary @image.jpg http://127.0.0.1:8000/v1/predict",
        "python -m serve.edge http://127.0.0.1:8000 image.jpg     # downloads the model, runs it alone",
        "```",
        "",
        f"Input `images`: uint8 (N, {manifest['rule']['size']}, {manifest['rule']['size']}, 3), any N. "
        f"{manifest['input'][0].upper()}{manifest['input'][1:]}. "
        f"Outputs: `logits`, `probabilities`, `log_prior`, float32 (N, {len(classes)}). To shift the answers, "
        "subtract `tail_shift * log_prior` from the logits, then take the softmax. Classes and figures are in the file's "
        "metadata under `cibl_ray`, as JSON.",
        "",
        "## Limits",
        "",
        f"The worst class has {_percent(worst)} % accuracy. Classes with few training images have few errors counted "
        "against them in training and are the least certain. Images unlike the training images get an answer all the same: "
        "there is no class for 'none of these'.",
        "",
        "## Origin",
        "",
        *pretrained_lines(source.get("pretrained")),
        *_second_stage_lines(source.get("start"), manifest["config"]["train"]),
        f"Run `{source['run']}`, {source['checkpoint']} after epoch {source['epoch']} (SHA-256 {source['checkpoint_sha256']}). "
        + ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
        + f". Written {manifest['created']}.",
        "",
    ]
    path.write_text("\n".join(lines))


def _own_shift(default: float) -> str:
    """What the card says of a shift that is in the answers already."""
    if not default:
        return ""
    return f" The answers have a shift of {default:g} already, and yours is added to it: {-default:g} is the model as trained."


def _float_lines(of_int8: dict[str, Any] | None) -> list[str]:
    """Which layers of int8 are in float32; nothing of a bundle without int8, or of an earlier version."""
    if not of_int8 or "float_share" not in of_int8:
        return []
    linear, convolutions = (of_int8["float_layers"][kind] for kind in ("linear", "convolutions"))
    kept = [plural(len(linear), "linear layer")] if linear else []
    if convolutions:
        kept.append(f"{plural(len(convolutions), 'depthwise convolution')} (with them in int8 a group lost too much)")
    share = f"{100 * of_int8['float_share']:.0f} % of the weights stay in float32"
    return ["", f"int8 has a scale for each output channel. {share}: {' and '.join(kept) or 'no layer'}."]


def pretrained_lines(pretrained: dict[str, Any] | None) -> list[str]:
    """What the card says of the weights that training started from, with an empty line behind it.

    Args:
        pretrained: `Origin` as a mapping; None where the network began from random weights.
    """
    if pretrained is None:
        return []
    licence = pretrained["licence"]
    said = f"licence {licence}" if licence else "their licence is not known here: ask where they come from"
    return [f"The backbone started from pretrained weights of {pretrained['network']}: {pretrained['weights']}; {said}.", ""]


def _second_stage_lines(start: str | None, train: dict[str, Any]) -> list[str]:
    """What the card says of the run whose weights this one started from; nothing of a run that started by itself."""
    if start is None:
        return []
    if train["tune"] != "classifier":
        return [f"The weights started as those of the run `{start}`.", ""]
    how = f", τ-normalised with τ = {train['tau']}" if train["head_start"] == "tau_normalized" else ""
    trained = f", trained for {train['epochs']} epochs" if train["epochs"] else ""
    return [f"Second stage: the classifier, from the run `{start}`{how}{trained}.", ""]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
