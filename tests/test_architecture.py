"""The rules of who may import whom, held by reading the imports of every file."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APPLICATIONS = ("server", "clients", "simulations", "reports")

# What each part of the library may import of the library; its own part always.
ALLOWED = {
    "errors": set(),
    "environment": set(),
    "files": {"errors"},
    "processes": set(),
    "bits": {"errors"},
    "models": {"errors"},
    "data": {"errors", "files"},
    "metrics": {"errors"},
    "codecs": {"bits", "errors"},
    "quant": {"models", "bits", "errors"},
    "devices": {"errors"},
    "config": {"data", "quant", "codecs", "devices", "errors"},
    "attackers": {"config", "errors"},
    "privacy": {"config", "saved", "errors"},
    "partitioners": {"config", "data", "errors"},
    "layout": {"errors"},
    "packed": {"bits"},
    "expected": {"layout", "codecs", "errors"},
    "payload_header": {"expected"},
    "payload": {"payload_header", "expected", "layout", "codecs", "errors"},
    "identity": {"environment"},
    "records": {"payload", "environment", "errors"},
    "saved": {"files", "errors"},
    "variances": set(),
    "aggregation": {"layout", "saved", "variances"},
    "client_evaluation": {"records", "terms", "config"},
    "terms": {"expected", "layout", "config", "devices", "errors"},
    "downlink": {
        "codecs",
        "terms",
        "payload",
        "payload_header",
        "expected",
        "layout",
        "aggregation",
        "saved",
        "config",
        "errors",
    },
    "shrinkage": {"layout", "codecs", "aggregation"},
    "update_file": {"errors"},
    "robust": {
        "update_file",
        "aggregation",
        "terms",
        "layout",
        "variances",
        "config",
        "errors",
    },
    "replies": {
        "expected",
        "terms",
        "records",
        "payload",
        "payload_header",
        "layout",
        "aggregation",
        "robust",
        "shrinkage",
        "update_file",
        "config",
    },
    "exchange": {"records"},
    "roster": {"exchange", "records", "terms", "config", "errors"},
    "buffered": {"config", "rounds", "replies", "records", "terms", "saved", "errors"},
    "rounds": {
        "exchange",
        "roster",
        "downlink",
        "saved",
        "replies",
        "privacy",
        "robust",
        "client_evaluation",
        "terms",
        "records",
        "expected",
        "layout",
        "aggregation",
        "config",
        "errors",
    },
    "training": {
        "variances",
        "quant",
        "data",
        "codecs",
        "metrics",
        "models",
        "layout",
        "expected",
        "payload",  # distributed training sends gradients as clients send updates
        "payload_header",
        "bits",
        "packed",
        "config",
        "files",
        "errors",
    },
    "memory": {"config", "quant", "training", "errors"},
    # Trains and measures by means of the library; nothing in the library knows of it.
    "paper": {
        "config",
        "data",
        "training",
        "models",
        "memory",
        "measured",
        "sweep",
        "metrics",
        "files",
        "errors",
    },
    "measured": {"memory", "config", "files", "errors"},
    "ladder": {"measured", "config", "errors"},
    "sweep": {"measured", "memory", "config", "files", "errors"},
}
# Which applications each application may import; `reports` is what server and simulations show.
APPLICATIONS_ALLOWED = {
    "reports": set(),
    "server": {"reports"},
    "clients": set(),
    "simulations": {"server", "clients", "reports"},
}
FLOWER_FILES = {
    f"fedcunet/{name}.py" for name in ("records", "identity", "rounds", "exchange", "roster")
}


def imports_of(path: Path) -> list[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    names = []
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from fedcunet import metrics` imports a module too.
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def part_of(module: str) -> str | None:
    """`data` for `fedcunet.data.crops`; None for what is not in the library."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fedcunet" and len(parts) > 1 else None


@pytest.mark.parametrize("path", files("fedcunet"), ids=lambda path: str(path.relative_to(ROOT)))
def test_library_files_import_only_what_their_part_may(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    part = part_of(module)
    imported = imports_of(path)
    assert not [name for name in imported if name.split(".")[0] in APPLICATIONS]
    if part in ("commands", "__main__", "__init__", None):
        return
    known = {found for name in imported if (found := part_of(name)) in ALLOWED}
    assert known <= ALLOWED[part] | {part}


@pytest.mark.parametrize("path", files("fedcunet"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_named_library_files_import_flower_and_none_ray(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert "ray" not in tops
    if str(path.relative_to(ROOT)) not in FLOWER_FILES:
        assert "flwr" not in tops


@pytest.mark.parametrize("folder", APPLICATIONS)
def test_applications_import_only_the_applications_they_may(folder: str) -> None:
    for path in files(folder):
        found = {name.split(".")[0] for name in imports_of(path)} & set(APPLICATIONS)
        assert found <= APPLICATIONS_ALLOWED[folder] | {folder}, path


def test_reports_are_made_without_torch_flower_or_ray() -> None:
    for path in files("reports"):
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not tops & {"torch", "flwr", "ray"}, path


def test_the_app_that_servers_and_clients_fetch_holds_all_that_it_imports() -> None:
    setting = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    sent = {entry.split("/")[0] for entry in setting["tool"]["flwr"]["app"]["fab-include"]}
    # `python -m server` and `python -m clients` are started from the repository itself.
    for path in [path for folder in sent for path in files(folder) if path.stem != "__main__"]:
        found = {name.split(".")[0] for name in imports_of(path)} & {"fedcunet", *APPLICATIONS}
        assert found <= sent, path


def test_one_file_alone_touches_what_flower_does_not_promise() -> None:
    touching = {
        str(path.relative_to(ROOT))
        for folder in ("fedcunet", *APPLICATIONS)
        for path in files(folder)
        if any(name.startswith("flwr.supercore") for name in imports_of(path))
    }
    assert touching == {"fedcunet/identity.py"}


def test_every_part_of_the_library_has_a_rule() -> None:
    parts = {path.stem if path.is_file() else path.name for path in (ROOT / "fedcunet").iterdir()}
    assert parts - {"__init__", "__main__", "__pycache__", "commands"} <= set(ALLOWED)


def test_the_page_of_traps_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 30
    assert named <= defined, named - defined


def test_the_settings_that_help_and_pages_name_are_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = [path.read_text(encoding="utf-8") for path in pages]
    texts += [path.read_text(encoding="utf-8") for folder in APPLICATIONS for path in files(folder)]
    named = set(re.findall(r"simulations/settings/[\w/-]+\.toml", "".join(texts)))
    assert len(named) >= 3
    assert [name for name in named if not (ROOT / name).is_file()] == []
