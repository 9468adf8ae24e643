"""Score videos by the reward, component by component, and by metrics that no reward contains.

    python -m extras.score video.mp4                   its first frame is taken as the portrait
"""

import argparse
import sys

from data import folder_clips, load_clip
from extras.arguments import CROP_HELP, Parser, check_numbers, crop_argument
from extras.files import MediaError, one_line
from extras.reward_flags import make_judge, make_reward, measuring_sync, reward_flags, table
from extras.talkers import synthetic_clips
from reward import Unrated
from sample import identity_cosine, sync_metrics


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("videos", nargs="+", metavar="FILE")
    p.add_argument("--data", metavar="DIR", help="real clips to compare with (drawn talkers)")
    p.add_argument("--size", type=int, default=64, help="pixels per side (%(default)s)")
    p.add_argument("--chunk-frames", type=int, default=4, help="of the generator they are from (%(default)s)")
    p.add_argument("--sync", metavar="DIR", help="the sync network that measures, or none (the one for drawn "
                   "talkers; with --data none)")
    p.add_argument("--crop", type=crop_argument, default="none", help=CROP_HELP)
    reward_flags(p)
    args = p.parse_args(argv)
    check_numbers(p, args, size=32, chunk_frames=2)
    return args


def main(argv: list[str] | None = None) -> None:
    args, clips, broken = parse_arguments(argv), [], []
    for path in args.videos:
        try:
            clips.append(load_clip(path, args.size, args.crop))
        except MediaError as error:
            broken.append(str(error))
    if not clips:
        raise MediaError("; ".join(broken))
    if args.data:
        good, _ = folder_clips(args.data, args.size, 3.0, args.crop)
    else:
        good = synthetic_clips(64, args.size, 2.0)
        print("note: compared with drawn talkers; for people, name clips of people with --data, and --judge, "
              "--sync and --reward-sync of such clips", file=sys.stderr)
    for clip in [*clips, *good]:
        if len(clip.frames) < args.chunk_frames:
            raise MediaError(clip.name, f"has {len(clip.frames)} frames; lower --chunk-frames")
    reward = make_reward(args, make_judge(args), good, args.chunk_frames)
    sync = measuring_sync(args)
    for clip in clips:
        frames, audio = clip.frames[None] / 255, clip.audio[None]
        portrait = frames[:, 0]
        try:
            scores = reward(frames, audio, portrait, [clip.name])
        except Unrated as error:
            broken.append(str(error))
            continue
        print(f"{clip.name}: {frames.shape[1]} frames\n{table(reward, {'': scores})}")
        if sync:
            held_out = sync_metrics(sync, frames, audio)
            held_out["identity_cosine"] = identity_cosine(sync, frames, portrait).mean(1)
            print("held out, no part of the reward:  "
                  + "  ".join(f"{name} {value.item():.3f}" for name, value in held_out.items()))
    if broken:
        raise MediaError(f"{len(broken)} of {len(args.videos)} videos could not be scored", "; ".join(broken))


if __name__ == "__main__":
    with one_line("stopped", "lower --size, or use --device cpu"):
        main()
