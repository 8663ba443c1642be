"""The copy of a run in an object store: what it holds, how it is written, and how a run continues from it.

    MIRROR/checkpoints/<step>/...             the files of a checkpoint; its manifest.json is written last
    MIRROR/run.json, metrics.jsonl, ...       the records of the run, as of the newest checkpoint or later
    MIRROR/model/..., model.manifest.json     the exported model; the manifest is written last

An object appears whole or not at all, and nothing in a folder counts before its manifest is there. So a process may be
killed at any moment: what is in the mirror stays usable, and the next start uploads the rest.
"""
