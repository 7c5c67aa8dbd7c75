"""Tables of what was trained: compression tokens, gates, and the embedded model itself."""

from __future__ import annotations

from typing import Any

from tables import latest, model_note, table

CORE = ("exist", "color", "shape", "size", "where", "read")


def trained_text() -> str:
    """Describe what training brought."""
    return "\n\n".join((_voco_text(), _gates_text(), _shorter_steps_text()))


def _voco_text() -> str:
    result = latest("voco-*.json")
    world = result["world"]
    bounds, taught = world["untrained"], world["trained"]
    counts = list(next(iter(taught.values()))["accuracy"])
    rows: list[tuple[str, ...]] = [("tokens per image", *counts)]
    for name in ("random", "pool2d"):
        rows.append((f"`{name}`, not taught", *(f"{bounds[f'{name}(keep={n})']:.2f}" for n in counts)))
    rows += [(name, *(f"{row['accuracy'][n]:.2f}" for n in counts)) for name, row in taught.items()]
    any_row = next(iter(taught.values()))
    return (
        f"**Compression tokens** against as many pooled or random ones: {world['questions']} held-out questions for "
        f"{' and '.join(world['families'])}; all 256 tokens {bounds['full']:.2f}, the picture of another question "
        f"{world['full_shuffled']:.2f}. Taught: language model and projector, batch {any_row['batch']}, up to "
        f"{any_row['questions_per_picture']} questions per picture, one of the counts drawn for each step; one run "
        f"each, torch {result['versions']['torch']}, by `python benchmarks/voco.py world`. `ce+kd` distils from the "
        "untouched model, `ce` does not; `distinct` tokens have entries of their own, and with `parts` each was asked "
        f"to look at its own part of the image.{model_note(result)}\n\n{table(rows)}\n\n{_voco_verdict(world, counts)}"
    )


def _voco_verdict(world: dict[str, Any], counts: list[str]) -> str:
    """Say at how many counts the best compression tokens win, against rivals as they are and taught."""
    bounds, taught = world["untrained"], world["trained"]
    own = {name: row["accuracy"] for name, row in taught.items() if name.startswith("voco")}
    best = max(own, key=lambda name: sum(own[name].values()))
    rivals = {
        f"`{name}`, not taught,": {n: bounds[f"{name}(keep={n})"] for n in counts} for name in ("random", "pool2d")
    }
    rivals |= {f"`{name.split(',')[0]}`, taught,": row["accuracy"] for name, row in taught.items() if name not in own}
    found = (
        f"{rival} is beaten at {sum(own[best][n] > theirs[n] for n in counts)} of {len(counts)} counts"
        for rival, theirs in rivals.items()
    )
    return f"By {best}: {'; '.join(found)}."


def _gates_text() -> str:
    result = latest("training-*.json")
    rows: list[tuple[str, ...]] = [("plan", "taught", "accuracy", "visual tokens per layer")]
    rows += [
        (
            f"`{plan.split(', trained=')[0]}`",
            _how_taught(row),
            f"{row['accuracy']:.3f} +- {row['half_width']:.3f}",
            f"{row['layer_average']:.0f}",
        )
        for plan, row in result["gates"].items()
        if "refused" not in row
    ]
    return (
        "**Learned gates** against methods that need no training, exact match on held-out questions of six kinds, by "
        "`python benchmarks/training.py`. Rows with as many tokens per layer are to be compared; `fastv` reads the "
        f"question there, `uniform_in_llm`, `random_in_llm` and `p_mod` do not.{model_note(result)}\n\n{table(rows)}"
    )


def _how_taught(row: dict[str, Any]) -> str:
    """Say for how many steps, and at which rates, the gates of a row were taught, and whether the model was too."""
    if "steps" not in row:
        return ""
    said = f"{row['steps']} steps at {row['learning_rate']:g}"
    return (
        said if row["trained"] == "plan" else f"{said}, language model at {row['learning_rate'] * row['model_rate']:g}"
    )


def _shorter_steps_text() -> str:
    result = latest("training-*.json")
    own, curves = result["time"], {name.split(",")[0]: row for name, row in result["curves"].items()}
    parts = 4
    steps = next(iter(curves.values()))["steps"]
    rows: list[tuple[str, ...]] = [
        ("learned under", *(f"loss to step {steps * (part + 1) // parts}" for part in range(parts)), "CPU s", "full")
    ]
    for name, row in sorted(curves.items()):
        size = len(row["loss"]) // parts
        cut = [row["loss"][part * size : (part + 1) * size] for part in range(parts)]
        means = (f"{sum(loss for _, loss in points) / size:.3f}" for points in cut)
        rows.append((f"`{name}`", *means, f"{row['cpu_seconds']:.0f}", f"{row['accuracy']['full']:.3f}"))
    return (
        f"**Shorter steps.** A training step ({own['setting']}) takes {own['cpu_seconds']['pyramiddrop()']:.2f} s of "
        f"processor time with `pyramiddrop()` and {own['cpu_seconds']['none']:.2f} s without: "
        f"{own['ratio']:.2f} of the time (median of {own['repeats']} in turn). The language model of the demo model "
        f"going on for {steps} steps under either, mean losses, and what it then answers with all tokens:"
        f"{model_note(result)}\n\n{table(rows)}"
    )


def _shares(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{value:.2f}" for value in row["families"].values())


def card_pictures() -> str:
    """Describe what the embedded model knows, by kind of question."""
    result = latest("default-model-*.json")
    found, versions = result["measured"], result["versions"]
    pictures = found["pictures"]
    clips = {name.split()[2]: row for name, row in found.items() if name.startswith("clips")}
    each = pictures["questions"] // len(pictures["families"])
    half = next(iter(clips.values()))
    kinds = list(half["families"])
    rows = [("", *pictures["families"]), ("accuracy", *_shares(pictures))]
    frames = [("frames", *kinds, "mean")]
    frames += [
        (count, *(f"{row['families'][kind]:.2f}" for kind in kinds), f"{row['mean']:.2f}")
        for count, row in clips.items()
    ]
    core = pictures["families"]
    mean = sum(core[name] for name in CORE) / len(CORE)
    return (
        f"Exact match, greedy, all tokens, {each} held-out questions per kind about pictures and "
        f"{half['questions'] // len(kinds)} about clips (float32, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {result['date']}), by `python benchmarks/default_model.py`. Mean of the first "
        f"six kinds: **{mean:.3f}**.\n\n{table(rows)}\n\nClips, by the number of frames:\n\n{table(frames)}"
    )


def card_retention() -> str:
    """Describe what the embedded model loses when tokens are dropped."""
    found = latest("default-model-*.json")["measured"]
    names = list(dict.fromkeys(name.split()[0] for name in found if name.split()[-1].replace(".", "").isdigit()))
    keeps = list(dict.fromkeys(name.split()[1] for name in found if name.split()[-1].replace(".", "").isdigit()))
    rows: list[tuple[str, ...]] = [("kept of 256", *names)]
    rows += [(f"{float(keep):.0%}", *(f"{found[f'{name} {keep}']['mean']:.3f}" for name in names)) for keep in keeps]
    return table(rows)
