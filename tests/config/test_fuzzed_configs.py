"""Configs with values that nobody means: each is read, or refused in lines, at once; nothing else happens."""

import itertools
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
from pydantic import BaseModel
from runs import small_run
from small_corpora import Prepared

from triplane.config.explain import _subtables
from triplane.config.load import load_config
from triplane.config.toml import to_toml
from triplane.plan.command import plan
from triplane.plan.gate import examine, memory_problem
from triplane.storage.errors import ConfigError
from triplane.training.config import RunConfig
from triplane.training.exits import Exit

CONFIGS = 300
LIMIT_S = 10
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "64",
    "8",
    "16",
    "2147483648",
    "999999999999",
    "1" + 30 * "0",
    "1e-300",
    "1e308",
    "1.5",
]
WORDS = ["inf", "-inf", "nan", "none", "true", '""', '"x"', '"auto"', '"bf16"', '"/dev/null"', '"a\\u0000b"']
NESTED = ["[]", "{}", "[[1]]", "[{}]", '[{corpus="/nowhere"}]', "[{from_sequence=8,weights=[1],seq_len=64}]", 99 * "["]


def values(table: type[BaseModel], path: str = "") -> Iterator[tuple[str, object]]:
    """Every key, tables too, with its annotation."""
    for name, field in table.model_fields.items():
        yield path + name, field.annotation
        for below in _subtables(table, name):
            yield from values(below, f"{path}{name}.")


def overrides(seed: int) -> list[str]:
    """Some keys, mostly with numbers where numbers are meant."""
    draw = random.Random(seed)
    known = [(key, kind) for key, kind in values(RunConfig) if key not in ("run_dir", "data.cache_dir")]
    chosen = draw.sample(known, draw.choice((1, 1, 2, 3)))
    usual = {key: NUMBERS if "int" in str(kind) or "float" in str(kind) else WORDS for key, kind in chosen}
    return [f"{key}={draw.choice(draw.choice((usual[key], usual[key], usual[key], NESTED)))}" for key, _ in chosen]


def too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


def test_what_nobody_means_is_refused_in_lines(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, too_long)
    Path("run.toml").write_text(to_toml(small_run(prepared, Path("run"), parallel={"dp": "auto"})))
    found: dict[str, int] = {"refused": 0, "problems": 0, "sound": 0}
    for seed in range(CONFIGS):
        changed = overrides(seed)
        signal.alarm(LIMIT_S)
        try:
            config = load_config(Path("run.toml"), changed)
            ranks = 1 + seed % 8
            findings = examine(config, ranks)
            lines = [*findings.problems, *findings.notes()]
            code = plan(
                Path("run.toml"),
                changed,
                gpus=ranks,
                gpu_name="h100",
                searching=False,
                price=None,
                currency=None,
                time_limit_days=None,
                json_path=None,
            )
            assert code == (Exit.FAILED if findings.problems else Exit.OK) or code == Exit.FAILED, changed
            if not findings.problems:
                memory_problem(config, ranks)
            found["problems" if findings.problems else "sound"] += 1
        except ConfigError as error:
            lines = str(error).splitlines()
            found["refused"] += 1
        except BaseException as error:
            raise AssertionError(changed) from error
        finally:
            signal.alarm(0)
        assert all(line.strip() and "\n" not in line and len(line) < 2000 for line in lines), changed
        assert "Traceback" not in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["run.toml"], changed
    assert all(count > CONFIGS / 100 for count in found.values()), found


def test_files_that_are_no_config_are_refused_in_lines(tmp_path: Path) -> None:
    draw = random.Random(7)
    path = tmp_path / "run.toml"
    text = Path("configs/quickstart.toml").read_bytes()
    for _ in range(100):
        cut = bytearray(text)
        for _ in range(draw.choice((1, 3, 20))):
            place = draw.randrange(len(cut))
            cut[place : place + draw.choice((0, 1, 40))] = draw.randbytes(draw.choice((0, 1, 5)))
        path.write_bytes(bytes(cut))
        with suppress(ConfigError):
            load_config(path)
    path.write_bytes(b"a = " + 100_000 * b"[")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert load_config(path) == load_config(Path("configs/quickstart.toml"))


def test_none_unsets_a_key(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    config = small_run(prepared, tmp_path / "run", checkpoint={"folder": "elsewhere"})
    path.write_text(to_toml(config))
    assert load_config(path, ["checkpoint.folder=none"]).checkpoint.folder is None
    assert load_config(path, ['checkpoint.folder="none"']).checkpoint.folder == "none"


def test_an_override_is_blamed_for_what_it_brought(prepared: Prepared, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(small_run(prepared, tmp_path / "run")))
    for text in itertools.chain(["MODEL.dim=5", "a.b=1", "model.dim=-1", "model.dim.x=1"]):
        with pytest.raises(ConfigError, match=r"^override: "):
            load_config(path, [text])
