# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""
Runs transformers' own common tests on our classes, and ends with pytest's line and exit code.

    python tests/conformance/run.py [pytest arguments, such as -k resize]

The tests come from the source archive of the installed version of transformers on the package index; they are kept in
`.conformance/`, and downloaded once. Those of generation are not in the archive: they run if you put that version's
`tests/generation/test_utils.py`, from transformers' repository, at `.conformance/transformers-VERSION/generation_tests.py`.
"""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
VERSION = version("transformers")
SUITE = REPOSITORY / ".conformance" / f"transformers-{VERSION}"
GENERATION_TESTS = "tests/generation/test_utils.py"

# What the common tests import although the source archive lacks it. The mixins add tests that are not in the archive;
# in their place these add none.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    GENERATION_TESTS: "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    # The processor tests read pictures from the Hub through this. Ours are drawn: nothing else is downloaded.
    "utils/fetch_hub_objects_for_ci.py": """\
from pathlib import Path

from PIL import Image


def url_to_local_path(url):
    if Path(url).suffix not in (".png", ".jpg", ".jpeg"):
        return url
    path = Path(__file__).with_name(Path(url).name)
    if not path.exists():
        Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(path)
    return str(path)
""",
}


def fetch_suite():
    """Downloads the source archive of the installed version, and unpacks its tests, unless they are there."""
    archive = SUITE / f"transformers-{VERSION}.tar.gz"
    unpacked = SUITE / "unpacked"  # written last
    if not archive.exists():
        SUITE.mkdir(parents=True, exist_ok=True)
        print(f"Downloading the source archive of transformers {VERSION}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", SUITE]
        subprocess.run([*pip, f"transformers=={VERSION}"])
    if not archive.exists():
        sys.exit(
            f"The source archive of transformers {VERSION} holds the tests, but pip could not fetch it: see above.\n"
            "It is on the package index: check the connection and `pip config list`. Or fetch the file elsewhere\n"
            f"(`pip download --no-deps --no-binary :all: transformers=={VERSION}`), and put it at {archive}"
        )
    if not unpacked.exists():
        with tarfile.open(archive) as files:
            for member in files.getmembers():
                parts = Path(member.name).parts[1:]  # the first names the version
                if member.isfile() and ".." not in parts and (parts == ("pyproject.toml",) or parts[:1] == ("tests",)):
                    write(SUITE.joinpath(*parts), files.extractfile(member).read())
        write(unpacked, b"")
    for name, text in STAND_INS.items():
        write(SUITE / name, text.encode())
    generation_tests = SUITE / "generation_tests.py"
    if generation_tests.exists():
        write(SUITE / GENERATION_TESTS, generation_tests.read_bytes())
    else:
        print(f"Without the tests of generation: there is no {generation_tests}", flush=True)


def write(path: Path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main() -> int:
    fetch_suite()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(SUITE))  # its package is `tests`
    import pytest

    options = [
        *("-c", str(SUITE / "pyproject.toml")),  # declares the suite's markers
        *("--rootdir", str(REPOSITORY), "--confcutdir", str(HERE)),
        *("-p", "no:cacheprovider", "--disable-warnings", "-q", "-rsfE"),
    ]
    return pytest.main([*options, *sys.argv[1:], *sorted(map(str, HERE.glob("conformance_*.py")))])


if __name__ == "__main__":
    sys.exit(main())
