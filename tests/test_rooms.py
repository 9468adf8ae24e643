"""Which room may import which: read off the source, so that an arrow is a fact and not a promise."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The rooms in the order in which they build on each other: at its top a file imports what stands before it.
ORDER = """
    extras.files extras.media extras.processes extras.arguments data kernels model grpo reward
    extras.mouths extras.face sample extras.talkers extras.page extras.report extras.pretrained extras.sync
    extras.endpoint extras.reward_flags extras.flags extras.session extras.footage extras.measuring train
    extras.rivals extras.score extras.people extras.lessons extras.school kernels.bench""".split()
# The functions that import an extra when a run asks for it, so that nobody else needs it; no other may.
ON_DEMAND = {
    ("data", "hear"): {"extras.pretrained"},                    # --audio-encoder
    ("data", "load_clip"): {"extras.face"},                     # --crop face
    ("data", "_decode_all"): {"extras.face"},
    ("extras.reward_flags", "make_judge"): {"extras.endpoint"},  # --judge-url
    ("kernels.bench", "bench_whole"): {"train", "extras.flags", "extras.reward_flags", "extras.talkers"},
}


@cache
def files() -> dict[str, list[Path]]:
    """Room -> its files. The kernels are one room, their benchmark another."""
    rooms: dict[str, list[Path]] = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("kernels/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name != "extras.__init__":
            rooms.setdefault(room_of(name), []).append(path)
    return rooms


def room_of(name: str) -> str:
    """The room of a module: kernels.attention belongs to kernels, torch.nn to none of ours."""
    if name.startswith("kernels") and name != "kernels.bench":
        return "kernels"
    return name


@cache
def imports(path: Path) -> list[tuple[str | None, str]]:
    """(function or None at the top, module) for each import in a file."""
    found = []

    def visit(node: ast.AST, function: str | None) -> None:
        if isinstance(node, ast.FunctionDef) and function is None:
            function = node.name
        if isinstance(node, ast.Import):
            found.extend((function, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            package = node.module == "extras"                   # from extras import people
            found.extend((function, f"extras.{alias.name}" if package else node.module)
                         for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, function)
    visit(ast.parse(path.read_text()), None)
    return found


def arrows() -> list[tuple[str, str | None, str]]:
    """(room, function or None at the top, room of ours that it imports) for each import."""
    return [(room, function, room_of(module)) for room, paths in files().items() for path in paths
            for function, module in imports(path) if room_of(module) in {*ORDER} - {room}]


def test_a_room_imports_those_before_it_and_in_functions_what_is_named():
    assert sorted(files()) == sorted(ORDER)
    for room, function, imported in arrows():
        if function:
            assert imported in ON_DEMAND.get((room, function), set()), f"{room}.{function} imports {imported}"
        else:
            assert ORDER.index(imported) < ORDER.index(room), f"{room} imports {imported}"


def test_no_reward_can_reach_a_metric():
    """All held-out metrics stand in sample.py, which reads mouths by extras/mouths.py: nothing that reward.py
    imports, however deep, on demand too, leads there."""
    reached, ahead = set(), ["reward"]
    while ahead:
        room = ahead.pop()
        reached.add(room)
        ahead += {imported for of, _, imported in arrows() if of == room} - reached
    assert not reached & {"sample", "train", "grpo", "extras.mouths", "extras.school", "extras.lessons",
                          "extras.people"}
