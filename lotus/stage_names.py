"""The names of LOTUS' own stages, in order: each is the file ``lotus/stages/NAME.py``, which declares it as ``STAGE``.

They stand apart from those files, which take a third of a second to import: no verb's help needs that.
"""

STAGES = ("prepare", "inspect", "score", "select", "baseline", "train", "prune", "finetune", "export", "report")
