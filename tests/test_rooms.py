"""Which room may import which: read off the source, so that an arrow is a fact and not a promise."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAIN = {"data", "kernels", "model", "grpo", "reward", "sample"}

# A room and what the top of its file may import of ours, beside GROUND: files and media know no talkers
# and no models.
GROUND = {"extras.files", "extras.media"}
ARROWS = {
    "extras.files": set(),
    "extras.media": {"extras.files"},
    "data": set(),
    "kernels": set(),
    "model": {"data", "kernels"},
    "grpo": {"kernels", "model"},
    "reward": {"data", "model"},
    "sample": {"data", "kernels", "model", "reward", "extras.arguments", "extras.face", "extras.mouths"},
    "extras.arguments": set(),
    "extras.score": {"data", "reward", "sample", "extras.arguments", "extras.reward_flags", "extras.talkers"},
    "train": MAIN | {"extras.flags", "extras.footage", "extras.measuring", "extras.muon",
                     "extras.pretrained", "extras.processes", "extras.report", "extras.reward_flags",
                     "extras.session", "extras.talkers"},
    "extras.rivals": {"data", "model", "reward", "sample", "train", "extras.arguments", "extras.flags",
                      "extras.measuring", "extras.report", "extras.reward_flags", "extras.session"},
    "kernels.bench": {"data", "kernels", "model", "grpo"},
    "extras.talkers": {"data"},
    "extras.mouths": {"data", "model"},
    "extras.muon": set(),
    "extras.page": {"data"},
    "extras.report": {"data", "extras.page"},
    "extras.processes": set(),
    "extras.flags": {"data", "model", "grpo", "reward", "extras.arguments", "extras.pretrained",
                     "extras.processes", "extras.reward_flags"},
    "extras.session": {"data", "model", "reward", "extras.flags", "extras.processes", "extras.report"},
    "extras.measuring": {"data", "model", "grpo", "reward", "sample", "extras.processes", "extras.report",
                         "extras.reward_flags", "extras.session"},
    "extras.pretrained": {"data", "model"},
    "extras.endpoint": {"data", "reward", "extras.page"},
    "extras.reward_flags": {"data", "reward", "extras.arguments", "extras.sync"},
    "extras.sync": {"data", "reward"},
    "extras.footage": {"data", "reward", "sample", "extras.reward_flags", "extras.session", "extras.sync"},
    "extras.people": {"data", "model", "reward", "sample", "extras.arguments", "extras.page",
                      "extras.reward_flags", "extras.talkers"},
    "extras.lessons": MAIN | {"extras.mouths"},
    "extras.school": MAIN | {"extras.arguments", "extras.lessons", "extras.muon", "extras.people",
                             "extras.reward_flags", "extras.sync", "extras.talkers"},
    "extras.face": {"data"},
}
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


def imports() -> set[tuple[str, str | None, str]]:
    """(room, function or None at the top, room or module that is imported there). The kernels are one room,
    their benchmark another."""
    found = set()

    def visit(node: ast.AST, room: str, function: str | None) -> None:
        if isinstance(node, ast.FunctionDef) and function is None:
            function = node.name
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            package = node.module == "extras"                   # from extras import people
            modules = [f"extras.{alias.name}" for alias in node.names] if package else [node.module]
        found.update((room, function, room_of(module)) for module in modules)
        for child in ast.iter_child_nodes(node):
            visit(child, room, function)

    for path in [*ROOT.glob("*.py"), *ROOT.glob("extras/*.py"), *ROOT.glob("kernels/*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        visit(ast.parse(path.read_text()), room_of(name), None)
    return found


IMPORTS = imports()


def test_a_room_imports_what_its_place_allows_and_in_functions_what_is_named():
    assert {room for room, *_ in IMPORTS} == ARROWS.keys()
    for room, function, other in IMPORTS:
        ground = GROUND if room not in GROUND | {"kernels"} else set()
        allowed = ON_DEMAND.get((room, function), set()) if function else ARROWS[room] | ground
        assert other in allowed | {room} or other not in ARROWS, f"{room}.{function or ''} imports {other}"


def test_no_reward_can_reach_a_metric():
    """All held-out metrics stand in sample.py, which reads mouths by extras/mouths.py: nothing that reward.py
    imports, however deep, on demand too, leads there."""
    reached, ahead = set(), {"reward"}
    while ahead:
        reached |= ahead
        ahead = {other for room, _, other in IMPORTS if room in reached} - reached
    assert not reached & {"sample", "train", "grpo", "extras.mouths", "extras.school", "extras.lessons",
                          "extras.people"}
