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


def room_of(name: str) -> str:
    """The room of a module: kernels.attention belongs to kernels, torch.nn to none of ours."""
    return "kernels" if name.startswith("kernels") and name != "kernels.bench" else name


@cache
def arrows() -> list[tuple[str, str | None, str]]:
    """(room, function or None at the top, room of ours that it imports) for each import."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("kernels/*.py")]:
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for node in ast.parse(path.read_text()).body:
            for part in ast.walk(node):
                modules = []
                if isinstance(part, ast.ImportFrom) and part.module != "extras":
                    modules = [part.module]
                elif isinstance(part, ast.Import | ast.ImportFrom):                # from extras import people
                    package = "extras." if isinstance(part, ast.ImportFrom) else ""
                    modules = [package + alias.name for alias in part.names]
                found += [(room, getattr(node, "name", None), room_of(module)) for module in modules]
    return [(room, function, to) for room, function, to in found if to in ORDER and to != room]


def test_a_room_imports_those_before_it_and_in_functions_what_is_named():
    assert {room for room, *_ in arrows()} <= {*ORDER}
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
