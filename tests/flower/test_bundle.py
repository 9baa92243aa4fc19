"""What `flwr build` puts into the app that is sent to every site: no data, whatever lies beside it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed (extra: flower)")

APP = Path(__file__).parents[2] / "examples" / "flower"


def test_data_beside_the_app_stays_out_of_the_bundle(tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(APP, app)
    for name in ("own.jsonl", "data/site_0.jsonl", "own.csv", "own.json", "own.parquet", "notes.md"):
        (app / name).parent.mkdir(exist_ok=True)
        (app / name).write_text("a secret")
    flwr = Path(sys.executable).parent / "flwr"
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(tmp_path / "home"),
    }
    built = subprocess.run(
        [flwr, "build", "--app", app],
        cwd=tmp_path,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    assert not built.returncode, built.stdout + built.stderr
    (fab,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(fab) as bundle:
        assert {name for name in bundle.namelist() if not name.startswith(".info")} == {
            "pyproject.toml", "client_app.py", "server_app.py", "town.yaml"
        }  # fmt: skip
        assert not any(b"a secret" in bundle.read(name) for name in bundle.namelist())
