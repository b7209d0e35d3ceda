"""train_gpt.py stays readable: short functions, narrow lines, comments; former settings are still read."""

import ast
import json
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import train_gpt
from helpers import ROOT, options, train
from lib import names, runner

SOURCE = (ROOT / "train_gpt.py").read_text()
LINES = SOURCE.splitlines()


def test_a_function_fits_on_a_screen() -> None:
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 45}
    assert len(functions) > 100 and not long


def test_lines_are_narrow_and_commented() -> None:
    assert max(map(len, LINES)) <= 110
    assert sum(len(line) > 100 for line in LINES) <= 0.08 * len(LINES)
    assert sum(line.strip().startswith("#") for line in LINES) >= 0.06 * len(LINES)


def test_each_section_begins_with_prose() -> None:
    """Under the banner with its number, at least four lines in words."""
    starts = [i for i, line in enumerate(LINES) if re.match(r"# \d\. ", line)]
    assert [LINES[i][2] for i in starts] == list("12345678")
    for i in starts:
        assert LINES[i - 1] == "# " + "-" * 100
        assert all(line.startswith("#") for line in LINES[i : i + 5])


def test_the_script_imports_nothing_of_the_repository() -> None:
    """It is copied into record folders and must run there."""
    folders = [ROOT / name for name in ("tools", "tools/lib", "data", "tests")]
    own = {path.stem for folder in folders for path in folder.iterdir()}
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert {"torch", "numpy"} <= imported and not imported & own


def index_of_techniques() -> dict[str, tuple[list[str], list[str]]]:
    """The index at the head of section 4: the settings and the functions of each technique."""
    begin = next(i for i, line in enumerate(LINES) if line.startswith("# A decoder-only GPT."))
    rows = [line[6:] for line in LINES[begin : LINES.index("#", begin + 4)] if line.startswith("#     ")]
    parts = [re.split(r" {2,}", row) for row in rows]
    assert {len(part) for part in parts} == {3}
    found = {name: (re.findall(r"[\w.]+", s), re.findall(r"[\w.]+", f)) for name, s, f in parts}
    assert len(found) == len(rows) > 40
    return found


def test_the_index_leads_to_settings_and_functions_that_exist() -> None:
    """A setting is --section.field, or a field of `Stage`; a function may be a method."""
    sections = vars(train_gpt.Track()) | {"Stage": train_gpt.Stage}
    for name, (settings, functions) in index_of_techniques().items():
        assert functions, name
        for place in settings:
            section, field = place.split(".")
            assert hasattr(sections[section], field), place
        for place in functions:
            attrgetter(place)(train_gpt)  # AttributeError names what is missing


def test_the_index_has_every_setting_that_names_a_record() -> None:
    """And the words of the field under which people look for what has no record."""
    index = index_of_techniques()
    listed = {setting.split(".")[1] for settings, _ in index.values() for setting in settings}
    for section in vars(train_gpt.Track()).values():
        for f in train_gpt.dataclasses.fields(section):
            assert f.name in listed or not re.search(r"#\d", f.metadata["meaning"]), f.name
    words = ["folded", "matches", "MLP width", "EMA", "two-sided", "FSDP2", "overflow", "cautious", "taper"]
    assert not [word for word in words if not any(word in name for name in index)]


# ----------------------------------------------------------------------------------------------------
# Names of November 2026
# ----------------------------------------------------------------------------------------------------


def former_settings() -> dict[str, dict]:
    """The settings in the log of a record of that time."""
    path = next((ROOT / "records" / "tiny" / "2026-11-22_two-blocks" / "runs").glob("*.jsonl"))
    return json.loads(path.read_text().splitlines()[0])["settings"]


def test_logs_of_november_are_read_under_the_names_of_today() -> None:
    """Each former setting has a place, and each place exists."""
    before = former_settings()
    now = names.present_settings(before)
    today = json.loads(json.dumps(train_gpt.dataclasses.asdict(train_gpt.TRACKS["tiny"])))
    new = {"average": [*today["average"]], "model": ["matches", "ngram_fold"]}  # had no forerunners
    for section, fields in new.items():
        today[section] = {name: value for name, value in today[section].items() if name not in fields}
    for fields in today.values():
        fields.pop("rowwise", None)  # had none either
    today = {section: fields for section, fields in today.items() if fields}
    assert now.keys() == today.keys()
    assert {section: fields.keys() for section, fields in now.items()} == {
        section: fields.keys() for section, fields in today.items()
    }
    assert now["tables"] == before["value"] and now["matrix_adam"] == now["gate_adam"] == before["hidden"]
    assert now["matrix"]["iterations"] == before["matrix"]["steps"]
    assert now["model"]["attention_source"] == before["model"]["frozen"]


def test_options_are_translated_for_scripts_of_november(tmp_path: Path) -> None:
    words = [
        "--tables.lr", "2", "--matrix.iterations", "4", "--matrix_adam.lr", "0.1", "--gate_adam.lr", "0.1",
        "--model.attention_source", "-1", "--matrix.mlp_lr_mul", "(1.0,2.0)", "--head.lr", "0.5",
    ]  # fmt: skip
    old = ROOT / "records" / "tiny" / "2026-11-22_two-blocks" / "train_gpt.py"
    assert names.words_for(old, words) == [
        "--value.lr", "2", "--matrix.steps", "4", "--hidden.lr", "0.1", "--model.frozen", "-1",
        "--matrix.lr_mul", "(1.0,2.0)", "--head.lr", "0.5",
    ]  # fmt: skip
    for other in (ROOT / "train_gpt.py", tmp_path / "nothing.py"):
        assert names.words_for(other, words) == words
    train_gpt.parse_command_line(["--track", "tiny", *words])


def test_a_script_is_asked_for_an_option(tmp_path: Path) -> None:
    frozen = [*(ROOT / "records").glob("tiny/2026-11-22_*/train_gpt.py")]  # before there was such an option
    assert len(frozen) >= 6 and not any(names.knows(script, "show") for script in frozen)
    assert names.knows(ROOT / "train_gpt.py", "show") and not names.knows(tmp_path / "none.py", "show")


@pytest.mark.parametrize(
    "field, words", [("", []), ("    show: bool = field(True, 'x')\n", ["--show", "false"])]
)
def test_the_tools_ask_for_a_result_alone(tmp_path: Path, field: str, words: list[str]) -> None:
    """Where a script knows how; whoever wants to see more can say so."""
    script = tmp_path / "script.py"
    script.write_text(f"class Run:\n    seed = 0\n{field}import sys\nprint(*sys.argv[1:])\n")
    script.write_text(script.read_text().replace("class", "field = lambda *_: 0\nclass", 1))
    out = tmp_path / "out"
    status, said = runner.run_script(script, ["--show", "true"], out, lambda event: None)
    assert (status, said.split()) == (0, ["--out", str(out), *words, "--show", "true"])


@pytest.mark.usefixtures("data_dir")
def test_a_checkpoint_of_november_is_evaluated(tmp_path: Path, data_dir: Path) -> None:
    """Its model has `frozen` for what is called `attention_source` today."""
    train(options(out=tmp_path, checkpoint_every=100))
    (path,) = tmp_path.glob("*/step_000020.pt")
    use = ["--track", "tiny", "--device", "cpu", "--threads", "1", "--evaluate",
           str(data_dir / "shakespeare" / "val_000000.bin"), "--resume"]  # fmt: skip
    expected = train_gpt.main([*use, str(path)])
    content = torch.load(path, weights_only=True)
    model = content["key"]["track"]["model"]
    model["frozen"] = model.pop("attention_source")
    old = tmp_path / "old" / "step_000020.pt"
    train_gpt.save_checkpoint(old, {key: value for key, value in content.items() if key != "format"})
    assert train_gpt.main([*use, str(old)]) == expected
