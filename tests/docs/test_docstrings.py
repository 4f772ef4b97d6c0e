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
