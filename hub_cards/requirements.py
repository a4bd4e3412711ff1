"""What the reader of a card has to install, by this package's own metadata."""

from importlib.metadata import PackageNotFoundError, metadata

from packaging.requirements import Requirement

PACKAGE = "dparallel"


def needs_python() -> str:
    """ "3.10 or later"."""
    found = _metadata()
    return found["Requires-Python"].removeprefix(">=") + " or later" if found else "3"


def install_command(*names: str) -> str:
    """The shell command that installs packages in versions that work. This one, `PACKAGE`, comes from the address in
    its metadata; without one, from a copy of its sources, in which the command has to be run (`from_sources`)."""
    return " ".join(["pip install", *map(_spelled, names)])


def from_sources() -> str | None:
    """Which sources of this package they are, "dparallel 0.2.0", if its metadata has no address."""
    found = _metadata()
    return None if _address() else f"{PACKAGE} {found['Version']}" if found else PACKAGE


def _spelled(name):
    if name == PACKAGE:
        return f'"{PACKAGE} @ git+{_address()}"' if _address() else "."
    found = _metadata()
    for line in (found and found.get_all("Requires-Dist")) or []:
        requirement = Requirement(line)
        if requirement.name == name:
            return f'"{name}{",".join(sorted(map(str, requirement.specifier), reverse=True))}"'
    return name


def _address():
    found = _metadata()
    urls = [each.partition(", ") for each in (found and found.get_all("Project-URL")) or []]
    return next((url for label, _, url in urls if label.lower() in ("repository", "source")), None)


def _metadata():
    try:
        return metadata(PACKAGE)
    except PackageNotFoundError:  # run from its sources
        return None
