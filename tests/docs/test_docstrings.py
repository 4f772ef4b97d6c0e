from docs.extensions.docstrings import restructured, signature

DOCSTRING = """A network |w|* of `images`, x_ and <u, f>.

images: (N, C, H, W).  labels: (N,),
    of the classes.
seed, rate: numbers.

    J = |w|_2

The end."""


def test_arguments_are_a_list_formulas_literal_and_nothing_else_is_markup():
    assert restructured(DOCSTRING.split("\n")) == [
        r"A network \|w\|\* of \ ``images``\ , x\_ and \<u, f\>.",
        "",
        "- **images**: (N, C, H, W).",
        "",
        "- **labels**: (N,), of the classes.",
        "",
        "- **seed, rate**: numbers.",
        "",
        "::",
        "",
        "        J = |w|_2",
        "",
        "The end.",
        "",
    ]


def test_signatures_name_types_shortly():
    said = signature(None, "", "", None, None, "(a: dict[str, ~torch.Tensor] = <factory>)", None)
    assert said == ("(a: dict[str, Tensor] = ...)", None)


def test_signatures_name_types_without_the_objects_that_check_them():
    """Their addresses would stand on the page, and differ from build to build."""
    rule = "functools.partial(<function integer at 0x7f>, minimum=1)"
    given = f"(a: ~typing.Annotated[dict[str, int] | None, {rule}, <f at 0x2>] = 1, b: Annotated[str, {rule}] | None)"
    assert signature(None, "", "", None, None, given, "Annotated[int, x]") == (
        "(a: dict[str, int] | None = 1, b: str | None)",
        "int",
    )
