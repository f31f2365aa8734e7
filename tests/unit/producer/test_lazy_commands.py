from importlib.metadata import EntryPoint

import click
import pytest
from click.testing import CliRunner

from imagemill.producer import lazy_commands


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> click.Group:
    """A group with three entry points: one that works, one whose package is missing, one with a bug in imagemill."""
    values = {"doctor": "click:Command", "worker": "no_such_package.cli:run", "faulty": "imagemill.worker.no_such_module:run"}

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [EntryPoint(n, value, group) for n, value in values.items() if name in (None, n)]

    monkeypatch.setattr(lazy_commands, "entry_points", entry_points)
    return lazy_commands.Commands("imagemill")


def test_help_imports_no_entry_point(group: click.Group) -> None:
    result = CliRunner().invoke(group, ["--help"])
    assert result.exit_code == 0
    assert "Run a worker node" in result.stdout


def test_missing_package_error_names_the_extra(group: click.Group) -> None:
    result = CliRunner().invoke(group, ["worker", "--gpu", "0"])
    assert result.exit_code == 2
    assert result.stderr == (
        "error (missing_extra): `imagemill worker` needs no_such_package, which is not installed: "
        "pip install 'imagemill[worker]'\n"
    )


def test_package_missing_only_at_run_time_gives_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def worker() -> None:
        import no_such_package  # noqa: F401

    monkeypatch.setattr(lazy_commands, "entry_points", lambda group, **_: [EntryPoint("worker", "x:y", group)])
    monkeypatch.setattr(EntryPoint, "load", lambda _: worker)
    result = CliRunner().invoke(lazy_commands.Commands("imagemill"), ["worker"])
    assert (result.exit_code, result.stderr.partition(",")[0]) == (
        2,
        "error (missing_extra): `imagemill worker` needs no_such_package",
    )


def test_missing_imagemill_module_is_not_reported_as_a_missing_package(group: click.Group) -> None:
    assert isinstance(CliRunner().invoke(group, ["faulty"]).exception, ModuleNotFoundError)


def test_entry_point_receives_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @click.option("--gpu", type=int)
    def worker(gpu: int) -> None:
        click.echo(f"gpu {gpu}")

    monkeypatch.setattr(lazy_commands, "entry_points", lambda group, **_: [EntryPoint("worker", "x:y", group)])
    monkeypatch.setattr(EntryPoint, "load", lambda _: worker)
    assert CliRunner().invoke(lazy_commands.Commands("imagemill"), ["worker", "--gpu", "3"]).stdout == "gpu 3\n"
