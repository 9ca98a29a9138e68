"""Reading a recipe: what is accepted; every mistake says where it is and what would work."""

from pathlib import Path

import pytest

from fewstep.errors import RecipeError
from fewstep.prompts.spec import Spec
from fewstep.recipe.load import dump_yaml, load_recipe, load_yaml
from fewstep.recipe.schema import Dmd, ExplicitGrid, Recipe, ShiftGrid
from fewstep.recipe.teach import TeachRecipe
from fewstep.sweep.study import Study

ROOT = Path(__file__).parent.parent
UNIFIED = ROOT / "recipes" / "lab" / "unified.yaml"

SMALL = """\
name: small
model: {family: lab}
teachers:
  base: {weights: "bundled:base", tasks: [t2i], cfg: {t2i: 3.0}}
student: {init: base}
data:
  source: {kind: lab}
  pools:
    landscape: {task: t2i, category: landscape, size: 10}
  composition:
    t2i: {landscape: 1}
  mixture: {t2i: 1}
guidance:
  - weights: [{base: 1.0}]
objective: {kind: dmd}
budget: {updates: 2, batch: 4, micro_batch: 2}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refused(path: Path, **overrides: str) -> str:
    """The message of the refusal. In the names of overrides, `__` stands for a dot."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, dotted)
    return str(caught.value)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_unified_recipe_holds_what_its_file_says():
    recipe = load_recipe(UNIFIED)
    assert recipe.teachers["t2i"].weights == "bundled:t2i"
    assert recipe.teachers["base"].cfg == {"t2i": 3.0, "edit": 2.0}
    assert recipe.student.grid == ShiftGrid(kind="shift", steps=4, shift=3.0)
    assert recipe.data.mixture == {"t2i": 5.0, "edit": 5.0}
    assert [(rule.when.task, rule.when.category) for rule in recipe.guidance] == [
        ("t2i", None),
        ("edit", None),
    ]
    assert recipe.guidance[0].weights[2] == {"base": 0.5, "t2i": 0.5}
    assert isinstance(recipe.objective, Dmd) and recipe.objective.fake_updates == 3
    assert recipe.ema is not None and recipe.ema.decay == 0.98


def test_every_shipped_recipe_loads_under_a_name_of_its_own():
    files = [
        file
        for file in sorted((ROOT / "recipes").glob("*/*.yaml"))
        if file.parent.name not in ("prompts", "studies")  # of another shape, tested with it
    ]
    names = [load_recipe(file).name for file in files if not file.stem.startswith("teach")]
    assert len(names) >= 14 and len(set(names)) == len(names)


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path):
    recipe = load_recipe(UNIFIED, {"ema": "null", "student.grid": "{kind: explicit, t: [1, 0.5]}"})
    again = load_recipe(write(tmp_path, "again.yaml", dump_yaml(recipe)))
    assert again == recipe and again.content_hash() == recipe.content_hash()


def test_the_hash_follows_what_decides_the_student_and_nothing_else(small: Path):
    plain = load_recipe(small).content_hash()
    same = {"name": "other", "log.every": "7", "evaluation.per_category": "3"}
    assert load_recipe(small, same).content_hash() == plain
    for key, value in {
        "seed": "1",
        "optim.fake.lr": "2e-4",
        "guidance.0.weights": "[{base: 1}, {base: 1}, {base: 1}, {base: 1}]",
        "ema": "null",
    }.items():
        assert load_recipe(small, {key: value}).content_hash() != plain, key


def test_a_recipe_is_frozen(small: Path):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(small).seed = 3


def test_overrides_reach_mappings_lists_and_variants(small: Path):
    recipe = load_recipe(
        small,
        {
            "budget.updates": "10",
            "optim.student.lr": "1e-3",
            "guidance.0.weights.0.base": "0.5",
            "student.grid": "{kind: explicit, t: [1, 0.5]}",
            "ema": "null",
            "objective.renoise.shift": "3",
        },
    )
    assert recipe.budget.updates == 10 and recipe.optim.student.lr == 1e-3
    assert recipe.guidance[0].weights == ({"base": 0.5},)
    assert recipe.student.grid == ExplicitGrid(kind="explicit", t=(1.0, 0.5))
    assert isinstance(recipe.objective, Dmd) and recipe.objective.renoise.shift == 3.0
    assert recipe.ema is None


def test_extends_merges_mappings_and_replaces_lists_and_variants(tmp_path: Path, small: Path):
    write(
        tmp_path,
        "child.yaml",
        "extends: small.yaml\nname: child\nbudget: {updates: 9}\n"
        "guidance: [{weights: [{base: 0.5}]}]\nstudent: {grid: {kind: explicit, t: [1.0]}}\n",
    )
    grandchild = write(
        tmp_path, "grandchild.yaml", "extends: child.yaml\nstudent: {grid: {kind: shift}}\n"
    )
    recipe = load_recipe(grandchild)
    assert recipe.name == "child"
    assert (recipe.budget.updates, recipe.budget.batch) == (9, 4)
    assert len(recipe.guidance) == 1 and recipe.guidance[0].weights == ({"base": 0.5},)
    assert recipe.student.grid == ShiftGrid(kind="shift")


def test_extends_in_a_circle_is_refused(tmp_path: Path):
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    message = refused(write(tmp_path, "b.yaml", "extends: a.yaml\n"))
    assert "extends itself: b.yaml -> a.yaml -> b.yaml" in message


def test_extends_of_a_missing_file_names_it_and_the_line(tmp_path: Path):
    message = refused(write(tmp_path, "a.yaml", "name: a\nextends: nowhere.yaml\n"))
    assert f"a.yaml:2: extends: there is no file {tmp_path / 'nowhere.yaml'}" in message


def test_a_mistake_in_a_parent_names_the_parents_line(tmp_path: Path, small: Path):
    small.write_text(SMALL.replace("mixture: {t2i: 1}", "mixtur: {t2i: 1}"))
    message = refused(write(tmp_path, "child.yaml", "extends: small.yaml\n"))
    assert "small.yaml:12: data.mixtur: unknown key; did you mean 'mixture'?" in message


def test_a_missing_file_among_many_names_the_nearest_alone(small: Path):
    for i in range(12):
        write(small.parent, f"other{i:02}.yaml", "")
    message = refused(small.parent / "smal.yaml")
    assert message.endswith("there is no such file; did you mean 'small.yaml'?")


def test_a_missing_file_names_its_neighbours(small: Path):
    message = refused(small.with_name("smal.yaml"))
    assert "smal.yaml: there is no such file; did you mean 'small.yaml'?" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "does not hold `key: value` lines"),
        ("name: [1\n", ":2:1: is not valid YAML"),
        ("name: a\n\tseed: 1\n", ":2:1: is not valid YAML"),
        ("name: a\nseed: 1\nname: b\n", ":3: name: the key is given twice, first at "),
        ("budget:\n  batch: 1\n  batch: 2\n", ":3: budget.batch: the key is given twice"),
        ("{a: 1}: b\n", ":1: a key must be a word"),
        ("a: &x [*x]\n", ":1: a[0]: an alias contains itself"),
        ("name: !!python/object:os.system x\n", ":1: name: cannot be read"),
        ("seed: 2024-13-45\n", ":1: seed: cannot be read"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(tmp_path: Path, text: str, expected: str):
    assert expected in refused(write(tmp_path, "broken.yaml", text))


def test_a_file_that_is_no_text_or_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    assert "binary.yaml: is not UTF-8 text (byte 6)" in refused(tmp_path / "binary.yaml")
    assert "is a folder; give the path of a YAML file" in refused(tmp_path)


@pytest.mark.parametrize(
    ("line", "wrong", "expected"),
    [
        (16, ("updates: 2", "update: 2"), "budget.update: unknown key; did you mean 'updates'?"),
        (
            5,
            ("init: base", "init: base, grid: {kind: shift, shifts: 3}"),
            "student.grid.shifts: unknown key; did you mean 'shift'? known: kind, steps, shift",
        ),
        (
            5,
            ("init: base", "init: base, grid: {kind: shft}"),
            "student.grid.kind: 'shft' is none of the choices; use 'shift', 'explicit'",
        ),
        (
            5,
            ("init: base", "init: base, grid: {steps: 4}"),
            "student.grid: has no `kind`; use one of: shift, explicit",
        ),
        (
            4,
            ("tasks: [t2i]", "tasks: [t2i, edits]"),
            "teachers.base.tasks[1]: 'edits' is none of the choices; use 't2i' or 'edit'",
        ),
        (4, ("tasks: [t2i], ", ""), "teachers.base.tasks: is missing"),
        (4, ("cfg: {t2i: 3.0}", "cfg: {t2i: .inf}"), "teachers.base.cfg.t2i: inf should be a"),
        (
            4,
            ("  base: {", "  my teacher: {"),
            "teachers.my teacher: 'my teacher' is no name; use letters",
        ),
        (
            9,
            ("size: 10", "size: 0"),
            "data.pools.landscape.size: 0 should be greater than or equal to 1",
        ),
        (
            11,
            ("landscape: 1}", "landscape: -1}"),
            "data.composition.t2i.landscape: -1 should be greater than or equal to 0",
        ),
        (
            14,
            ("weights: [{", "weight: [{"),
            "guidance[0].weight: unknown key; did you mean 'weights'?",
        ),
        (
            15,
            ("kind: dmd", "kind: dmd, fake_updates: many"),
            "objective.fake_updates: 'many' is no whole number",
        ),
        (16, ("batch: 4", "batch: 4.5"), "budget.batch: 4.5 should be a valid integer"),
    ],
)
def test_a_wrong_field_is_refused_with_line_path_and_what_would_work(
    small: Path, line: int, wrong: tuple[str, str], expected: str
):
    assert wrong[0] in SMALL
    small.write_text(SMALL.replace(*wrong))
    message = refused(small)
    assert f"small.yaml:{line}: {expected}" in message


SHAPES = {
    "lab/unified.yaml": (Recipe, "a recipe; `fewstep distill` takes it"),
    "lab/teach_t2i.yaml": (TeachRecipe, "a teacher's recipe; `fewstep teach` takes it"),
    "studies/guidance.yaml": (Study, "a study; `fewstep sweep` takes it"),
    "prompts/portrait.yaml": (Spec, "a spec of prompts; `fewstep prompts write` takes it"),
}


@pytest.mark.parametrize("given", SHAPES)
def test_a_file_of_another_shape_is_told_by_what_it_is(given: str):
    path = ROOT / "recipes" / given
    for schema, _ in SHAPES.values():
        if schema is SHAPES[given][0]:
            load_yaml(path, schema)
            continue
        with pytest.raises(RecipeError) as caught:
            load_yaml(path, schema)
        assert str(caught.value) == f"{path}: is {SHAPES[given][1]}"


def test_several_mistakes_are_told_at_once(small: Path):
    message = refused(small, seed="-1", budget__batch="0", nam="x")
    assert "3 mistakes" in message
    assert "--set seed=-1: seed: -1 should be greater than or equal to 0" in message
    assert "--set budget.batch=0: budget.batch: 0 should be greater" in message
    assert "--set nam=x: nam: unknown key; did you mean 'name'?" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("budget.update", "3", "budget.update: unknown key; did you mean 'updates'?"),
        ("guidance.1.weights", "[]", "guidance: has no entry '1'; use 0 to 0"),
        ("guidance.first", "1", "guidance: has no entry 'first'"),
        ("name.x", "1", "name: is 'small' and has nothing called 'x'"),
        ("budget..updates", "1", "is no dotted path"),
        ("budget.updates", "[1", "'[1' is not a valid YAML value"),
        ("budget.updates", "", "budget.updates: None is no whole number"),
        ("budget.updates", "1e3", "budget.updates: '1e3' is no whole number; write 1000"),
        ("budget", "300", "budget: 300 holds no `key: value` pairs; its keys: updates, batch, mic"),
        ("objective", "dmd", "objective: 'dmd' holds no `key: value` pairs; such as {kind: dmd}"),
        ("model.family", "qwen", "model.family: 'qwen' is none of the choices; use 'lab', 'folder"),
        ("evaluation.seed", "-5", "evaluation.seed: -5 should be greater than or equal to 0"),
        ("seed", "4294967296", "seed: 4294967296 should be less than 4294967296"),
        ("student.grid", "{kind: explicit, t: [1, x]}", "student.grid.t[1]: 'x' is no number"),
    ],
)
def test_a_wrong_override_is_refused_by_name(small: Path, key: str, value: str, expected: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(small, {key: value})
    assert str(caught.value).startswith(f"--set {key}={value}: {expected}".removesuffix(": "))


def test_every_field_with_a_default_of_the_paper_is_reachable_by_override(small: Path):
    """The choices that the paper leaves open are all fields (paper.md, "not given")."""
    recipe = load_recipe(
        small,
        {
            "optim.student.lr": "3e-5",
            "teachers.base.cfg.t2i": "4.5",
            "objective.renoise": "{kind: uniform, low: 0.1, high: 0.9, shift: 2}",
            "objective.fake_updates": "2",
            "objective.normaliser": "none",
            "objective.anchor.weight": "0.1",
            "student.grid.kind": "shift",
            "student.grid.steps": "2",
        },
    )
    assert isinstance(recipe, Recipe)
    assert isinstance(recipe.objective, Dmd) and recipe.objective.anchor.weight == 0.1
    assert recipe.objective.normaliser == "none"
    assert isinstance(recipe.student.grid, ShiftGrid) and recipe.student.grid.steps == 2
