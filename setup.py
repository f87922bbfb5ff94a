"""Metadata is in pyproject.toml. This file must not need torch: it runs before torch is there.

An installed package carries csrc/ and, where torch and a compiler were at hand when it was installed
(pip install --no-build-isolation .), the libraries built from it. An editable install has csrc/ beside the package;
what was not built at installation is built by `make build` or on first use.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "flowrl_mega")
            for folder in (package / "csrc", package / "ops" / "lib"):
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
            shutil.copytree("csrc", package / "csrc")
            self.distribution.native = build_libraries(package, Path(self.get_finalized_command("build").build_temp))
            if self.distribution.native:
                self.distribution.has_ext_modules = lambda: True  # it goes where platform-specific packages go

    def get_source_files(self) -> list[str]:
        """What a source distribution holds."""
        return [*super().get_source_files(), *map(str, Path("csrc").glob("*/*.*"))]


class BdistWheel(bdist_wheel):
    """Any Python 3 can load the libraries, but only this platform."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.native
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def build_libraries(package: Path, cache: Path) -> bool:
    """Into package/ops/lib what can be built here; whether that is anything."""
    sys.path.insert(0, str(package.parent))  # for flowrl_mega.file_lock
    spec = importlib.util.spec_from_file_location("flowrl_mega_build", package / "ops" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    target = package / "ops" / "lib"
    for kind in build.KINDS:
        try:
            library = build.cached(kind, package / "csrc", cache)
        except build.BuildError as error:
            print(f"flowrl-mega is installed without its {kind} library: {error}", file=sys.stderr)
            continue
        target.mkdir(exist_ok=True)
        for suffix in (".so", ".json"):
            shutil.copyfile(library.with_suffix(suffix), target / f"{kind}{suffix}")
    return target.exists()


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
