"""The compose files: nobody is root, nothing is in plaintext, and Flower knows every option that they give."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ubsmoe.engines.flower.app import QUIET
from ubsmoe.engines.flower.resident import FOLDER as RESIDENTS

FOLDER = Path(__file__).parents[3] / "deploy"
SERVICES = {
    name: service
    for file in FOLDER.glob("*.compose.yaml")
    for name, service in yaml.safe_load(file.read_text())["services"].items()
}

FLOWER = [name for name, service in SERVICES.items() if service["command"][0].startswith("flower-")]


def test_the_image_is_quiet_and_not_root() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert all(f"{key}={value}" in text for key, value in QUIET.items())
    assert re.search(r"^USER ubsmoe$", text, re.MULTILINE)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_not_root_and_has_no_rights(name: str) -> None:
    service: dict[str, Any] = SERVICES[name]
    assert service["user"] not in ("0", "root") and service["read_only"] and service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "proxy" else [])


@pytest.mark.parametrize("name", FLOWER)
def test_a_service_of_flower_speaks_tls_and_keeps_its_state(name: str) -> None:
    service: dict[str, Any] = SERVICES[name]
    assert "--insecure" not in service["command"]
    words = " ".join(service["command"])
    assert ("--enable-supernode-auth" in words and "--ssl-keyfile" in words) or "--auth-supernode-private-key" in words
    assert any(volume.startswith("state:") for volume in service["volumes"])


@pytest.mark.parametrize("name", FLOWER)
def test_flower_knows_the_options(name: str) -> None:
    program, *words = SERVICES[name]["command"]
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), "--help"], capture_output=True, text=True, check=True
    )
    # at the start of a line of the list of options, with a value exactly where the help has one
    known = {name: value for line in done.stdout.splitlines() for name, value in options_of(line)}
    for name, _, value in (word.partition("=") for word in words if word.startswith("--")):
        assert name in known and bool(value or follows(words, name)) == known[name], name


def options_of(line: str) -> list[tuple[str, bool]]:
    """The options that a line of an argparse help page introduces, and whether they take a value."""
    if not re.match(r" {2,4}-", line):
        return []
    return [(name, bool(value)) for name, value in re.findall(r"(--[\w-]+)(?:[ =]([A-Z_\[{]+))?", line.split("   ")[0])]


def follows(words: list[str], option: str) -> bool:
    """Whether the next word is the option's value."""
    rest = words[words.index(option) + 1 :] if option in words else []
    return bool(rest) and not rest[0].startswith("-")


def test_every_variable_of_ubsmoe_that_a_file_sets_is_one_that_the_code_reads() -> None:
    found = {name for service in SERVICES.values() for name in service.get("environment", {}) if "UBSMOE" in name}
    assert found == {RESIDENTS}


SPEC = {
    "image",
    "user",
    "read_only",
    "cap_drop",
    "cap_add",
    "security_opt",
    "restart",
    "environment",
    "command",
    "ports",
    "volumes",
    "tmpfs",
}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.compose.yaml")), ids=lambda file: file.name)
def test_a_file_keeps_to_the_compose_specification(file: Path) -> None:
    """As far as it is used here: known keys, volumes that are declared or stand beside the file, paths that are mounted."""
    text = file.read_text()
    whole = yaml.safe_load(text)
    declared = whole.get("volumes", {})
    assert set(whole) <= {"services", "volumes"}
    for service in whole["services"].values():
        assert set(service) <= SPEC
        mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
        assert {name for name in mounts if not name.startswith("./")} <= set(declared)
        for path in re.findall(r"""[=" ](/[a-z]+)/""", " ".join(service["command"])):
            tmpfs = [place.split(":")[0] for place in service["tmpfs"]]
            assert any(path == place or place.startswith(f"{path}/") for place in (*mounts.values(), *tmpfs))
    variables = {name: rest for name, rest in re.findall(r"\$\{(\w+)(:[?-][^}]+)?\}", text)}
    assert all(variables.values()), "every variable has a default or a sentence that asks for it"
    asked = {name for name, rest in variables.items() if rest.startswith(":?")}
    head = text.split("services:")[0]
    assert all(f"{name}=" in head for name in asked), "the head of the file names what must be set"


def test_the_gpu_file_adds_a_gpu_to_the_node_and_nothing_else() -> None:
    """Compose lays it over node.compose.yaml: maps are joined, and it names no list that would replace one."""
    whole = yaml.safe_load((FOLDER / "gpu.override.yaml").read_text())
    ((name, added),) = whole["services"].items()
    assert set(whole) == {"services"} and name in SERVICES and set(added) == {"environment", "deploy"}
    (device,) = added["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert any(
        added["environment"]["CUDA_CACHE_PATH"].startswith(place.split(":")[0]) for place in SERVICES[name]["tmpfs"]
    )
    assert "model.device=" in " ".join(SERVICES[name]["command"])


def test_the_proxy_takes_the_port_that_the_server_leaves() -> None:
    proxy, server = SERVICES["proxy"], SERVICES["superlink"]
    assert proxy["ports"] == ["8000:8000", "8443:8443"] and server["ports"] == ["${LISTEN:-8000}:8000"]
    text = (FOLDER / "Caddyfile").read_text()
    assert "{$SUPERLINK:superlink:8000}" in text and "{$NODES_PORT:8000}" in text and "{$ADMIN_PORT:8443}" in text
