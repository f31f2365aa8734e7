"""The documentation: the site builds without warnings, its links lead somewhere, and what it shows works."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from itertools import takewhile
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel

from imagemill.producer.cli import main
from imagemill.producer.embedded_redis import EmbeddedRedis
from imagemill.shared.engines import ENGINES
from imagemill.shared.presets import Presets
from imagemill.shared.quality import RULES
from imagemill.shared.settings import PREFIX, Settings
from tests.conftest import environment_for, photo
from tests.workers import ROOT, WorkerProcess, clean_environment

FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "deploy/README.md", "examples/looks.yaml")]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *FRONT]
CONFIGURED_NAMES = ("docker-compose.yml", "deploy/compose.8gpu.yml", "Dockerfile.worker", "deploy/.env.example")
CONFIGURED = [ROOT / name for name in CONFIGURED_NAMES]
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(?:imagemill )?((?:[a-z]+ )+--?[^`]*|[a-z]+(?: [a-zA-Z]+)*)`")
CONTAINERS = ("imagemill", "worker", "gpus", "gpu0")
COMMANDS = {entry.name: entry for entry in entry_points(group="imagemill.commands")}


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """Title and text of a page's code blocks, without those that only include a file."""
    for language, title, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages and "--8<--" not in text:
            yield title, text


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Strict: a broken link, a missing anchor or a page outside the navigation fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = clean_environment(NO_MKDOCS_2_WARNING="1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_loads_nothing_from_other_servers(site: Path) -> None:
    outside = re.compile(r'<(?:script|link|img)\b[^>]*(?:src|href)="(?:https?:)?//')
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES) - len(FRONT)
    assert [page.name for page in pages if outside.search(page.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("page", FRONT, ids=ids)
def test_links_of_files_outside_the_site_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


# --- commands ---------------------------------------------------------------------------------------------------------


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, without variables, redirections and what precedes a container's arguments."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        for word in [*takewhile(lambda word: not word.startswith("#"), lexer), ";"]:
            if not set(word) <= set("();<>|&"):
                words.append(word)
                continue
            while words and (words[0] == "export" or re.match(r"\w+=", words[0])):
                words.pop(0)
            if words:
                yield in_container(words) if words[0] == "docker" else words
            words = []


def in_container(words: list[str]) -> list[str]:
    """`docker compose run ... worker models list` as `imagemill models list`."""
    start = next((place for place, word in enumerate(words) if word in CONTAINERS and "run" in words[:place]), None)
    return ["imagemill", *words[start + 1 :]] if start is not None and "--entrypoint" not in words else []


def parse(arguments: list[str]) -> tuple[click.Command, dict[str, object]]:
    """The command that these arguments call. Raises click.ClickException where one of them does not exist."""
    command: click.Command = main
    context = click.Context(main, info_name="imagemill")
    while isinstance(command, click.Group):
        name, *arguments = arguments or ["--help"]
        if name.startswith("-"):
            break
        found = COMMANDS[name].load() if name in COMMANDS and command is main else command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"there is no command {name}")
        command, context = found, click.Context(found, info_name=name, parent=context)
    values, _, _ = command.make_parser(context).parse_args(list(arguments))
    for parameter in command.params:
        value = values.get(parameter.name or "")
        if isinstance(value, str | list | tuple) and not isinstance(parameter.type, click.Path):
            parameter.type_cast_value(context, value)
    return command, values


class Submitted(Exception):
    """The command line has accepted a job."""


class FakeClient:
    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None: ...

    def s3(self) -> None: ...

    def submit(self, *_: object, **__: object) -> None:
        raise Submitted

    forecast = submit


def submit(arguments: list[str], folder: Path, presets: str) -> None:
    """Check a job's operation, engine, options, limits, preset and sources: all but Redis."""
    (folder / "looks.yaml").write_text(presets, encoding="utf-8")
    for name in ("urls.txt", "urls.csv", "list.csv"):
        (folder / name).write_text("source\n" * name.endswith("csv") + "https://example.com/1.jpg\n", encoding="utf-8")
    environment = {"IMAGEMILL_PRESETS": str(folder / "looks.yaml")}
    arguments = [word.replace("/srv", str(folder)) for word in arguments]
    outcome = CliRunner().invoke(
        main, arguments, obj=lambda _: FakeClient(), env=environment, input="https://example.com/1.jpg\n"
    )
    assert isinstance(outcome.exception, Submitted), f"{shlex.join(arguments)}: {outcome.output}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_in_shell_blocks_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    presets = "\n".join(text for title, text in blocks(page, "yaml") if title == "looks.yaml")
    for _, script in blocks(page, "sh"):
        for words in commands(script):
            program, *arguments = words or [""]
            if program == "make":
                assert {word for word in arguments if "=" not in word} <= set(targets), shlex.join(words)
            if program == "imagemill" or program.endswith("/imagemill"):
                parse(arguments)
                if arguments[:1] == ["submit"]:
                    submit(arguments, tmp_path, presets)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_in_running_text_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    known = main.list_commands(click.Context(main))
    for code in INLINE.findall(text):
        words = shlex.split(code)
        if words[0] in known and (len(words) > 1 or f"imagemill {code}" in text):
            parse(words)


def test_ci_and_pre_commit_use_targets_and_tools_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = [(ROOT / name).read_text(encoding="utf-8") for name in (".github/workflows/ci.yml", ".ci/run")]
    targets = {target for script in scripts for target in re.findall(r"\bmake (\w+)", script)}
    assert {"check", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [" ".join(hook["entry"].split()[:2]) in makefile for hook in hooks] == [True, True, True]


def test_command_that_does_not_exist_is_noticed() -> None:
    for wrong in (["sumbit"], ["submit", "--no-such-flag"], ["models", "pul"], ["submit", "--format", "gif"]):
        with pytest.raises(click.ClickException):
            parse(wrong)
    assert list(commands("A=1 docker compose run --rm -T worker models \\\n list < in.txt | less  # all")) == [
        ["imagemill", "models", "list"],
        ["in.txt"],
        ["less"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_and_limits_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    options = {name for engine in ENGINES for name in engine.options.model_fields}
    assert set(re.findall(r"--set (\w+)=", text)) - {"NAME", "KEY"} <= options
    assert set(re.findall(r"--limit (\w+)=", text)) - {"NAME"} <= set(RULES)


# --- settings and presets ---------------------------------------------------------------------------------------------


def settings(model: type[BaseModel] = Settings, prefix: str = PREFIX) -> Iterator[str]:
    """The environment variables of all settings."""
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from settings(type(field.default), f"{prefix}{name.upper()}__")
        else:
            yield prefix + name.upper()


@pytest.mark.parametrize("page", [*PAGES, *CONFIGURED], ids=ids)
def test_settings_exist(page: Path) -> None:
    named = set(re.findall(r"\bIMAGEMILL_[A-Z][A-Z0-9_]+", page.read_text(encoding="utf-8")))
    assert named <= {*settings(), "IMAGEMILL_TEST_WEIGHTS"}  # which only the tests read


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "yaml"))], ids=ids)
def test_presets_are_valid(page: Path, tmp_path: Path) -> None:
    for title, text in blocks(page, "yaml"):
        file = tmp_path / "looks.yaml"
        file.write_text(text, encoding="utf-8")
        assert title == "looks.yaml", "a block of YAML is a file of presets, or includes a file that is tested elsewhere"
        known = Presets(file)
        assert all(known.get(name).resolved() for name in known.names())


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=ids)
def test_python_runs(page: Path, redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    environment = environment_for(redis_server.url, tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(photo(1))
    with WorkerProcess(environment, tmp_path, name=f"docs{os.getpid()}") as worker:
        worker.wait_ready()
        for _, code in blocks(page, "python"):
            command = [sys.executable, "-c", code.replace("/srv", str(tmp_path))]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stderr
            assert " done file://" in done.stdout


def test_json_in_pages_is_valid() -> None:
    for page in PAGES:
        for value in re.findall(r"IMAGEMILL_\w+='(\[.*?\])'", page.read_text(encoding="utf-8")):
            assert json.loads(value)
