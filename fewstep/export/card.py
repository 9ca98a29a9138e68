"""README.md of an export: what it is, how it is played, how it was made, under which licence."""

import platform
from collections.abc import Iterable, Mapping, Sequence

import fewstep
from fewstep.export import usage
from fewstep.export.base import Licence
from fewstep.export.comfyui import RULES, unread
from fewstep.export.schedule import SAMPLE_SIGMAS, SCHEDULER, Playback
from fewstep.export.student import COMFYUI_FILE, LORA_FILE, History, Student

PIPELINE_TAGS = {"t2i": "text-to-image", "edit": "image-to-image"}


def card(
    student: Student,
    history: History,
    playback: Playback,
    licence: Licence,
    *,
    to: str,
    folder: str,
    hashes: Mapping[str, str],
) -> str:
    """`to` is diffusers, lora or comfyui; `hashes` are those of the exported files."""
    sections = [
        _header(student, licence, to),
        f"# {student.name}",
        _summary(student, to),
        "## Use in diffusers" if to != "comfyui" else "## Use in ComfyUI",
        _use(student, playback, to, folder),
        "## How it was made",
        _made(student, history),
        "## Evaluation",
        history.evaluation or "This run was not evaluated.",
        "## Licence",
        _licence(licence, student.base.path.name),
        "## Identity",
        _table(
            {"what": name, "hash": f"`{value}`"}
            for name, value in {**history.hashes, **hashes}.items()
        ),
        f"Exported by fewstep {fewstep.__version__}, Python {platform.python_version()}, "
        f"{_versions()}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(student: Student, licence: Licence, to: str) -> str:
    import yaml

    header: dict[str, object] = {"library_name": "diffusers"}
    if to == "comfyui":
        header = {}
    if licence.name is not None:
        header["license"] = licence.name.split()[0]
    header["pipeline_tag"] = PIPELINE_TAGS[student.tasks[0]]
    header["tags"] = ["fewstep", "distillation", *([] if to == "diffusers" else ["lora"])]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _summary(student: Student, to: str) -> str:
    k, base = len(student.times), student.base.path.name
    tasks = " and ".join({"t2i": "text-to-image", "edit": "editing"}[t] for t in student.tasks)
    kind = {
        "diffusers": f"The whole pipeline: `{base}` with the student as its transformer",
        "lora": f"A LoRA for the transformer of `{base}`, its scale folded in",
        "comfyui": f"A LoRA for `{base}` under ComfyUI's names, its scale folded in",
    }[to]
    times = ", ".join(f"{t:.6g}" for t in student.times)
    return (
        f"A student for {tasks} in {k} evaluations of the network and no guidance. {kind} "
        f"(`{student.base.pipeline}`).\n\n"
        f"It was trained at the times {times} (1 is noise; the last step ends at 0) and at "
        f"{student.size[0]} x {student.size[1]} pixels. At other times or with guidance it is "
        "another, untested model."
    )


def _use(student: Student, playback: Playback, to: str, folder: str) -> str:
    if to == "comfyui":
        return _comfyui(student, f"`{COMFYUI_FILE}`")
    code = usage.as_lora if to == "lora" else usage.as_pipeline
    parts = [f"```python\n{code(student, playback, folder)}\n```", _note(student, playback)]
    if to == "lora":
        parts += ["## Use in ComfyUI", _comfyui_of_lora(student)]
    return "\n\n".join(parts)


def _note(student: Student, playback: Playback) -> str:
    k = len(student.times)
    if playback.sample_sigmas is not None:
        return (
            f"`sample_sigmas` fixes the times of {SAMPLE_SIGMAS}, whatever num_inference_steps "
            "says."
        )
    if playback.sigmas is not None:
        return (
            f"**Every call needs `sigmas=`.** {SCHEDULER} cannot hold these times, and without "
            "the argument the pipeline silently plays others."
        )
    return f"The scheduler's configuration gives these times for num_inference_steps={k} only."


def _comfyui_of_lora(student: Student) -> str:
    pipeline = student.base.pipeline
    if pipeline not in RULES:
        return f"ComfyUI does not run the network of {pipeline} itself."
    if skipped := unread(pipeline, student.lora):
        return (
            f"ComfyUI would skip {len(skipped)} modules of this file, such as {skipped[0]}, whose "
            "names here it does not know. `fewstep export --to comfyui` writes a file that it "
            "reads whole."
        )
    return _comfyui(student, f"The same file, `{LORA_FILE}`,")


def _comfyui(student: Student, file: str) -> str:
    sigmas = ", ".join(f"{t:.6g}" for t in (*student.times, 0.0))
    return (
        f"{file} goes into `models/loras` and is loaded for the model only, with strength 1. "
        f"Sampler `euler`, cfg 1.0, {len(student.times)} steps, sigmas {sigmas}. The names follow "
        "ComfyUI's source; the file was not run in ComfyUI."
    )


def _made(student: Student, history: History) -> str:
    parts = [
        f"Distilled by [fewstep](https://arxiv.org/abs/2606.03746) with the recipe below: "
        f"{_trained(student)}, {student.precision}. {history.cost}".strip(),
        "### Teachers",
        _table(history.teachers) or "Not recorded.",
        "### Data",
        _table(history.data) or "Not recorded.",
        "### Recipe",
        f"```yaml\n{history.recipe.strip()}\n```",
    ]
    return "\n\n".join(parts)


def _trained(student: Student) -> str:
    if not student.lora:
        return "the whole network"
    ranks = sorted({factors.down.shape[0] for factors in student.lora.values()})
    told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f"a LoRA of rank {told} on {len(student.lora)} modules"


def _licence(licence: Licence, base: str) -> str:
    files = ", ".join(f"`{file.name}`" for file in licence.files)
    carried = f" Its {files} is copied here." if files else ""
    if licence.name is not None:
        return (
            f"A derivative of `{base}`, whose README declares the licence "
            f"**{licence.name}**.{carried} Its terms hold for this student too."
        )
    if files:
        return (
            f"A derivative of `{base}`, whose terms are in {files}, copied here; they hold for "
            "this student too."
        )
    return (
        f"A derivative of `{base}`. **Unknown:** its folder has no licence file, and no README "
        "that declares one. Look it up where you got the base, before you pass this on."
    )


def _table(rows: Iterable[Mapping[str, str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    columns: Sequence[str] = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _versions() -> str:
    import diffusers
    import torch

    return f"torch {torch.__version__}, diffusers {diffusers.__version__}"
