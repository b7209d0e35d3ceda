"""The field's optimizers as options of train_gpt.py, for the variants of a comparison: {"preset":
"muoneq-row"}.

They differ in the settings of the optimizer alone: matrices of the blocks as published, the rest as the
track has it, but for the decay of Moonlight and those after it, which is on every parameter. The
schedule of the momentum is the track's for all.
"""

from __future__ import annotations


def options(**settings: object) -> list[str]:
    """matrix__lr=0.02 as --matrix.lr 0.02."""
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('__', '.')}", str(value).replace(" ", ""))
    ]


# Keller Jordan's Muon: Newton-Schulz of five steps, sqrt(max(1, m / n)), no decay (KellerJordan/Muon)
MUON = options(
    matrix__orthogonalize="newton_schulz", matrix__iterations=5, matrix__norm_bound="frobenius",
    matrix__equilibrate="none", matrix__normuon=False, matrix__scale="spectral", matrix__weight_decay=0.0,
)  # fmt: skip
# Moonlight (2502.16982): updates of AdamW's RMS, decay 0.1 on all parameters, which have one
# learning rate there. Here lr * decay of the others is that of a matrix with lr 0.01, at their
# learning rates on `tiny` in November 2026, when the comparisons were made (0.6, 1, 0.008, 0.04)
MOONLIGHT = MUON + options(
    matrix__scale="match_rms_adamw", matrix__weight_decay=0.1, embed__weight_decay=0.0017,
    tables__weight_decay=0.001, head__weight_decay=0.125, scalar__weight_decay=0.025,
)  # fmt: skip

PRESETS = {
    # nanoGPT's AdamW (1711.05101) with betas (0.9, 0.95) and decay 0.1, for the gates too; the
    # learning rates are matrix_adam.lr and gate_adam.lr
    "adamw": options(
        matrix__kind="adam", gate__kind="adam",
        matrix_adam__betas=(0.9, 0.95), matrix_adam__weight_decay=0.1,
        gate_adam__betas=(0.9, 0.95), gate_adam__weight_decay=0.1,
    ),  # fmt: skip
    "muon": MUON,
    "moonlight": MOONLIGHT,
    # NorMuon (2510.05491): a mean square for each row after orthogonalising, 0.2 sqrt(m n) / ||O|| as step
    "normuon": MOONLIGHT + options(matrix__normuon=True, matrix__normuon_axis="row", matrix__beta2=0.95),
    # MuonEq (MaeChd/muon-eq): Moonlight with the rows and / or columns of the momentum balanced
    # before orthogonalising
    "muoneq-row": MOONLIGHT + options(matrix__equilibrate="row"),
    "muoneq-col": MOONLIGHT + options(matrix__equilibrate="col"),
    "muoneq-rowcol": MOONLIGHT + options(matrix__equilibrate="rowcol"),
    # there from step 1,000 of 20,000 on, here after as large a part of the 200 steps of `tiny`
    "muoneq-rowcol-phase": MOONLIGHT + options(matrix__equilibrate="rowcol", matrix__phase=10),
}
