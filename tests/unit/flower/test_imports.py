"""What the Flower rooms import: Flower starts a process for every message, and an app is made where Flower is not installed."""

import subprocess
import sys

import pytest

FLOWER = "ubsmoe.engines.flower"


def runs(code: str, *words: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("module", "without"),
    [
        *((name, ("flwr", "torch", "transformers")) for name in ("app", "keys", "localhost", "resident")),
        ("client", ("torch", "transformers")),
        ("record", ("torch", "transformers")),
    ],
)
def test_a_module_imports_no_more_than_it_needs(module: str, without: tuple[str, ...]) -> None:
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    assert not set(without) & set(runs(code, f"{FLOWER}.{module}").split())


@pytest.mark.parametrize(("module", "needs"), [("record", "flwr"), ("keys", "cryptography")])
def test_without_the_extra_the_error_says_how_to_install_it(module: str, needs: str) -> None:
    code = (
        "import importlib, sys; sys.modules[sys.argv[2]] = None\n"
        "try: importlib.import_module(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = runs(code, f"{FLOWER}.{module}", needs)
    assert said == f'UserError this needs {needs}: pip install "ubsmoe[flower]"\n'
