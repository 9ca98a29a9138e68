"""The code with which a stock installation plays an export; the tests run it as it is printed."""

from fewstep.export.schedule import SCHEDULER, Playback
from fewstep.export.student import LORA_FILE, Student
from fewstep.recipe.families import PIPELINES

WITHOUT_GUIDANCE = {
    "QwenImagePipeline": "true_cfg_scale=1.0",
    "QwenImageEditPlusPipeline": "true_cfg_scale=1.0",
    "QwenImage21Pipeline": "true_cfg_scale=1.0",
    "Flux2KleinPipeline": "guidance_scale=1.0",
    "StableDiffusion3Pipeline": "guidance_scale=1.0",
    "ZImagePipeline": "guidance_scale=0.0",  # it counts from 0
    "SanaPipeline": "guidance_scale=1.0",
}
DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}
TO_DEVICE = '.to("cuda" if torch.cuda.is_available() else "cpu")'
ARGUMENTS = {
    "t2i": ['prompt="a red lighthouse"'],
    "edit": ['image=[load_image("source.png")]', 'prompt="make it winter"'],
}
CAN = {kind: tasks for kinds in PIPELINES.values() for kind, tasks in kinds.items()}
"""What a class of pipelines does."""
IMAGE_POSITIONS = '''
def add_image_positions(module, args, kwargs):
    """transformers >= 5 needs them, and diffusers 0.42 does not pass them on (its issue 14194)."""
    if kwargs.get("pixel_values") is None or "mm_token_type_ids" in kwargs:
        return None
    is_image = kwargs["input_ids"] == module.config.image_token_id
    return args, {**kwargs, "mm_token_type_ids": is_image.int()}


{pipe}.text_encoder.register_forward_pre_hook(add_image_positions, with_kwargs=True)
'''
QWEN_IMAGE = ("QwenImagePipeline", "QwenImageEditPlusPipeline")


def as_lora(student: Student, playback: Playback, folder: str) -> str:
    """Python: the base with the LoRA and the scheduler of the export, then one image a task."""
    extra = ""
    if playback.sample_sigmas is not None:
        extra = f"    sample_sigmas={_numbers(playback.sample_sigmas)},\n"
    return "\n".join(
        [
            *_imports(student, f"DiffusionPipeline, {SCHEDULER}"),
            "",
            f'base, student = "{student.base.path.name}", "{folder}"  # your folders',
            f'scheduler = {SCHEDULER}.from_pretrained(student, subfolder="scheduler")',
            "pipe = DiffusionPipeline.from_pretrained(",
            f"    base,\n    scheduler=scheduler,\n{extra}    dtype={DTYPES[student.precision]},",
            ")",
            f'pipe.load_lora_weights(student, weight_name="{LORA_FILE}")',
            *_play(student, playback),
        ]
    )


def as_pipeline(student: Student, playback: Playback, folder: str) -> str:
    """Python: the export as a pipeline of its own, then one image a task."""
    return "\n".join(
        [
            *_imports(student, "DiffusionPipeline"),
            "",
            f'student = "{folder}"  # your folder',
            f"pipe = DiffusionPipeline.from_pretrained(student, dtype={DTYPES[student.precision]})",
            *_play(student, playback),
        ]
    )


def _imports(student: Student, names: str) -> list[str]:
    lines = ["import torch", f"from diffusers import {names}"]
    return [*lines, "from diffusers.utils import load_image"] if "edit" in student.tasks else lines


def _play(student: Student, playback: Playback) -> list[str]:
    kind, opened = student.base.pipeline, {"pipe"}
    lines = ["pipe" + TO_DEVICE]
    for task in student.tasks:
        pipe = "pipe" if task in CAN[kind] else "other"
        if pipe not in opened:
            lines += _other(student)
            opened.add(pipe)
        if task == "edit" and kind in QWEN_IMAGE:
            lines += IMAGE_POSITIONS.replace("{pipe}", pipe).splitlines()
        lines += ["", f"image = {pipe}("]
        lines += [f"    {argument}," for argument in _arguments(student, playback, task)]
        lines += [").images[0]", f'image.save("{task}.png")']
    return lines


def _other(student: Student) -> list[str]:
    """The second pipeline, around the network of the first."""
    assert student.companion is not None, "refused by export"
    return [
        "",
        f'other = "{student.companion.name}"  # your folder; it does what pipe does not',
        "other = DiffusionPipeline.from_pretrained(",
        "    other,\n    transformer=pipe.transformer,\n    scheduler=pipe.scheduler,",
        f"    dtype={DTYPES[student.precision]},\n)",
        "other" + TO_DEVICE,
    ]


def _arguments(student: Student, playback: Playback, task: str) -> list[str]:
    height, width = student.size
    arguments = [
        *ARGUMENTS[task],
        f"height={height}",
        f"width={width}",
        f"num_inference_steps={len(student.times)}",
        WITHOUT_GUIDANCE[student.base.pipeline],
        "generator=torch.Generator().manual_seed(0)",
    ]
    if playback.sigmas is not None:
        arguments.append(f"sigmas={_numbers(playback.sigmas)}")
    if student.base.pipeline == "QwenImage21Pipeline":
        arguments.append(f"output_resolution={student.source_resolution}")
    if student.base.pipeline == "SanaPipeline":
        arguments.append("use_resolution_binning=False")
    return arguments


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(repr(float(value)) for value in values) + "]"
