"""Every public name stands on a page of the API with a docstring of its own."""

import inspect
from types import ModuleType

import pytest

import meanfield as mf
from docs.extensions import reference

NAMES = [(module, name) for module in reference.modules() for name in reference.public(module)]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=lambda each: getattr(each, "__name__", each))
def test_a_public_name_is_documented(module, name):
    found = reference.member(module, name)
    if isinstance(found, ModuleType) or callable(found):
        said = found.__doc__ or ""
        assert said.strip()
        assert not said.startswith(f"{name}("), "dataclass wrote it"
    text = reference.page(module)
    assert f"{module.__name__}.{name}" in text


def test_names_of_the_package_and_one_level_below_are_all_there():
    pages = {module.__name__: set(reference.public(module)) for module in reference.modules()}
    assert pages["meanfield"] == set(mf.__all__)
    for name in mf.__all__:
        found = getattr(mf, name)
        if isinstance(found, ModuleType):
            assert set(getattr(found, "__all__", ())) <= pages[found.__name__]
    assert {"meanfield.solvers.splitting", "meanfield.finite.kernel", "meanfield.studies.convexity"} <= set(pages)
    assert {"draw", "start"} <= pages["meanfield.starts"]
    assert pages["meanfield.limits"] == {"memory", "within"}


def plain(member):
    """The function behind a method or a property, None where there is none."""
    for name in ("__func__", "fget", "func"):
        member = getattr(member, name, member)
    return member if inspect.isfunction(member) else None


CLASSES = {found: None for module, name in NAMES if inspect.isclass(found := reference.member(module, name))}


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: f"{found.__module__}.{found.__name__}")
def test_methods_and_properties_of_public_classes_are_documented(found):
    """By a docstring of their own, or by that of what they override, where that is not torch's: these words
    stand in for `extra_repr` alone, which no page shows.
    """

    def said(key):
        above = [plain(vars(base)[key]) for base in found.__mro__ if key in vars(base)]
        own = [each for each in above if each and not each.__module__.startswith("torch")]
        return any((function.__doc__ or "").strip() for function in own)

    methods = [key for key, member in vars(found).items() if not key.startswith("_") and plain(member)]
    assert [key for key in methods if key != "extra_repr" and not said(key)] == []
