"""Refusals that concern real models: do pipelines, teachers, data and objective fit each other."""

from fewstep.errors import RecipeError
from fewstep.recipe.facts import Facts
from fewstep.recipe.families import BASE, EDIT, MULTIPLE, PIPELINES, PipelineFacts
from fewstep.recipe.schema import Recipe, Task, Teacher

REAL_ONLY = ("path", "edit_path", "source_resolution", "cast")
TEACHER_ONLY = ("lora", "negative", "template")


def check_model(recipe: Recipe, facts: Facts) -> None:
    """Everything but the teachers' networks, which `check_real_teacher` looks at one by one."""
    if not recipe.model.is_real:
        _refuse_real_fields(recipe)
        return
    _check_folders(recipe, facts)
    _check_size(recipe)
    if recipe.model.roles.shard and recipe.model.roles.compile:
        raise RecipeError(
            "compiled blocks of a sharded network were never tried",
            field="model.cast.compile",
            hint="use compile: false, or shard: false where each device can hold the cast",
        )
    if recipe.data.source.kind != "prompts":
        raise RecipeError(
            f"{recipe.data.source.kind!r} data for a real model",
            field="data.source.kind",
            hint="use kind: prompts, whose rows may have real images too",
        )
    if facts.source_missing:
        raise RecipeError(
            f"there is no {recipe.data.source.path}",
            field="data.source.path",
            hint="give a file of prompts, or a folder with captions.jsonl and/or edits.jsonl",
        )


def _refuse_real_fields(recipe: Recipe) -> None:
    family = recipe.model.family
    hint = f"leave it out, or use a family of real models: {', '.join(PIPELINES)}"
    for name in REAL_ONLY:
        if getattr(recipe.model, name) is not None:
            raise RecipeError(f"is not for the family {family!r}", field=f"model.{name}", hint=hint)
    for name, teacher in recipe.teachers.items():
        for key in TEACHER_ONLY:
            if getattr(teacher, key) is not None:
                raise RecipeError(
                    f"is not for the family {family!r}", field=f"teachers.{name}.{key}", hint=hint
                )
        if teacher.grid == "pipeline":
            raise RecipeError(
                f"a {family} model has no pipeline",
                field=f"teachers.{name}.grid",
                hint="use grid: shift",
            )
    if recipe.data.source.kind == "prompts":
        raise RecipeError(
            f"prompts without images are for real models, and model.family is {family!r}",
            field="data.source.kind",
            hint=f"use kind: {family}",
        )


def _check_folders(recipe: Recipe, facts: Facts) -> None:
    model = recipe.model
    known = PIPELINES[model.family]
    if model.path is None:
        raise RecipeError(
            "is missing", field="model.path", hint=f"give the folder of a {' or '.join(known)}"
        )
    for field, name in (("model.path", BASE), ("model.edit_path", EDIT)):
        if name not in facts.pipelines:
            continue
        found = facts.pipelines[name]
        if found.problem:
            raise RecipeError(
                found.problem,
                field=field,
                hint=f"give the whole folder of a {' or '.join(known)}",
            )
        if found.kind not in known:
            family = next((f for f, kinds in PIPELINES.items() if found.kind in kinds), None)
            raise RecipeError(
                f"holds a {found.kind or f'{found.network} alone'}, and model.family is "
                f"{model.family!r}",
                field=field,
                hint=f"use family: {family}" if family else f"give a {' or '.join(known)}",
            )
    if EDIT in facts.pipelines and "edit" not in known[facts.pipelines[EDIT].kind]:
        able = [kind for kind, tasks in known.items() if "edit" in tasks]
        raise RecipeError(
            f"holds a {facts.pipelines[EDIT].kind}, which does not edit",
            field="model.edit_path",
            hint=f"give a {' or '.join(able)}" if able else "leave it out",
        )
    for task in recipe.data.trained():
        if task not in able_tasks(recipe, facts):
            _refuse_task(recipe, task, known)


def _refuse_task(recipe: Recipe, task: Task, known: dict[str, tuple[Task, ...]]) -> None:
    able = [kind for kind, tasks in known.items() if task in tasks]
    field = "model.edit_path" if task == "edit" else "model.path"
    others = [family for family, kinds in PIPELINES.items() if task in sum(kinds.values(), ())]
    raise RecipeError(
        f"data.mixture asks for {task!r}, which no pipeline here does",
        field=field if able else "model.family",
        hint=f"give a {' or '.join(able)} there, or use data.mixture {task}: 0"
        if able
        else f"use data.mixture {task}: 0, or family: {', '.join(others)}",
    )


def able_tasks(recipe: Recipe, facts: Facts) -> set[Task]:
    known = PIPELINES[recipe.model.family]
    kinds = [facts.pipelines[n].kind for n in (BASE, EDIT) if n in facts.pipelines]
    return {task for kind in kinds for task in known[kind]}


def _check_size(recipe: Recipe) -> None:
    multiple = MULTIPLE.get(recipe.model.family, 16)
    for name, value in zip(("height", "width"), recipe.model.size, strict=True):
        if value % multiple:
            lower = max(value // multiple, 1) * multiple
            raise RecipeError(
                f"{name} is {value}, which is no multiple of {multiple}",
                field="model.size",
                hint=f"use {lower} or {lower + multiple}",
            )
    if recipe.model.source_resolution and recipe.model.family != "qwen_image_21":
        raise RecipeError(
            f"the family {recipe.model.family!r} decides itself how large sources are",
            field="model.source_resolution",
            hint="leave it out",
        )


def check_real_teacher(recipe: Recipe, name: str, facts: Facts) -> None:
    """The network that a teacher names, its LoRA, its template; the student's start."""
    teacher = recipe.teachers[name]
    field = f"teachers.{name}.weights"
    found = facts.pipelines.get(teacher.weights)
    if found is None:  # only `edit` without a folder can be
        raise RecipeError(
            f"{teacher.weights!r} is the network of model.edit_path, which is not given",
            field=field,
            hint="give model.edit_path, or use base",
        )
    own = facts.pipelines[BASE]
    if found.problem:
        raise RecipeError(
            found.problem,
            field=field,
            hint="use base, edit, or the folder of a pipeline or of its transformer",
        )
    _check_same_network(found, own, teacher, field)
    if name in facts.lora_problems:
        raise RecipeError(
            facts.lora_problems[name],
            field=f"teachers.{name}.lora",
            hint=f"give a LoRA of the {own.network} in {teacher.weights}",
        )
    if teacher.template is not None and teacher.template.count("{prompt}") != 1:
        raise RecipeError(
            f"{teacher.template!r} does not hold {{prompt}} once",
            field=f"teachers.{name}.template",
            hint='such as "{prompt}, a photograph"',
        )
    if name == recipe.student.init:
        _check_start(teacher, name)


def _check_same_network(
    found: PipelineFacts, own: PipelineFacts, teacher: Teacher, field: str
) -> None:
    if found.network != own.network:
        raise RecipeError(
            f"{teacher.weights} holds a {found.network}, and the base is a {own.network}",
            field=field,
            hint="give a checkpoint of the base's kind: teachers share its latents and text",
        )
    odd = [n for n in found.shapes if own.shapes.get(n, found.shapes[n]) != found.shapes[n]]
    if odd:
        raise RecipeError(
            f"{teacher.weights}: {odd[0]} is {found.shapes[odd[0]]}, and {own.shapes[odd[0]]} in "
            "the base",
            field=field,
            hint="give a checkpoint of the base's size",
        )


def _check_start(teacher: Teacher, name: str) -> None:
    if teacher.lora is not None:
        raise RecipeError(
            f"{name!r} is a LoRA, and a student starts from a whole network",
            field="student.init",
            hint="start from a teacher without `lora`, or merge it into a checkpoint of its own",
        )
    if teacher.weights not in (BASE, EDIT):
        raise RecipeError(
            f"{name!r} is another checkpoint than the pipeline that a student is played in",
            field="student.init",
            hint="start from a teacher with weights: base or edit, or make it model.path",
        )
