"""Wrong implementations that the goldens of models with compressed entries list by name, each as a change of ours.

A mistake is planted into one CompressedServing through a MonkeyPatch. The serving must hold one request in a float32
cache, whose tokens all run in one step: rows from prompt_length on are then the decode steps.
"""

from __future__ import annotations

import numpy as np
import paddle

from tests.kit.compressed_mistakes.attention import (
    groups_strided,
    scale_with_magnitude,
    sinks_of,
    without_inverse_rotation,
    without_kv_norm,
    without_q_norm,
)
from tests.kit.compressed_mistakes.entries import (
    bias_phase_restarts,
    compressing,
    halves_swapped,
    mean_pooling,
    older_half_of_the_same_window,
    open_window_lost_at_decode,
    own_window_only,
    previous_window_lost_at_decode,
    without_bias,
)
from tests.kit.compressed_mistakes.layers import (
    bias_ignored,
    hash_ignored,
    sigmoid_scores,
    streams_not_transposed,
    three_sinkhorn_rounds,
    without_limit,
    without_scaling,
)
from tests.kit.compressed_mistakes.planting import Mistake, Planting
from tests.kit.compressed_mistakes.rotations import (
    compress_table_in_window_layers,
    decode_positions_plus_1,
    entry_positions,
    everywhere,
    first,
    in_the_indexer,
    last_by_halves,
    main_table_in_compressed_layers,
    no_yarn,
    tables,
    times_mscale,
)
from tests.kit.compressed_mistakes.selections import (
    choosing,
    folded_times,
    newest,
    previous_while_decoding,
    topk_of,
)
from tests.kit.compressed_mistakes.visibility import (
    preparing,
    seeing,
    window_of,
    without_listed_entries,
    without_selected_entries,
)

__all__ = ["MISTAKES", "SCORE_MISTAKES", "Mistake", "Planting"]

MISTAKES: dict[str, Mistake] = {
    # entries
    "CSA entry from its own window only": compressing(own_window_only, where="csa"),
    "indexer compressor without overlap": compressing(own_window_only, where="index"),
    "CSA Ca half from the same window": compressing(older_half_of_the_same_window, where="csa"),
    "CSA Ca/Cb halves swapped": compressing(halves_swapped, where="csa"),
    "CSA mean pooling": compressing(mean_pooling, where="csa"),
    "HCA mean pooling": compressing(mean_pooling, where="hca"),
    "CSA position bias dropped": compressing(without_bias, where="csa"),
    "HCA position bias dropped": compressing(without_bias, where="hca"),
    "indexer position bias dropped": compressing(without_bias, where="index"),
    "previous window lost between prefill and decode": compressing(previous_window_lost_at_decode, where="all"),
    "open window lost between prefill and decode": compressing(open_window_lost_at_decode, where="all"),
    "position-bias phase restarts at decode": compressing(bias_phase_restarts, where="all"),
    # what rows see
    "visible: i < pos//ratio": seeing(lambda position, ratio, closed: position // ratio),
    "visible: i < ceil((pos+1)/ratio)": seeing(
        lambda position, ratio, closed: np.minimum(-(-(position + 1) // ratio), closed)
    ),
    "window - 1": window_of(-1),
    "window + 1": window_of(1),
    "no compressed entries in CSA": without_selected_entries,
    "HCA entries ignored": preparing(without_listed_entries),
    # selections
    "k-1 entries": topk_of(-1),
    "k+1 entries": topk_of(1),
    "all entries": choosing(lambda s: s.visible),
    "newest k entries": choosing(newest),
    "no ReLU": choosing(lambda s: s.best(s.scores(has_relu=False))),
    "head weights ignored": choosing(lambda s: s.best(s.scores(weights=np.ones_like(s.head_weights)))),
    "decode uses the previous step's selection": choosing(previous_while_decoding),
    # rotations and positions
    "entry RoPE at its window's last token": entry_positions(lambda p, ratio: p // ratio * ratio + ratio - 1),
    "entry RoPE at position i, not i*ratio": entry_positions(lambda p, ratio: p // ratio),
    "compress rope table in sliding layers": tables(compress_table_in_window_layers),
    "main rope table in compressed layers": tables(main_table_in_compressed_layers),
    "no YaRN": tables(no_yarn),
    "cos/sin times mscale": tables(times_mscale),
    "decode positions one too high": tables(decode_positions_plus_1),
    "half-split RoPE everywhere": everywhere(last_by_halves),
    "rotate the first dims": everywhere(first),
    "indexer RoPE half-split": in_the_indexer(last_by_halves),
    "indexer rotates its first dims": in_the_indexer(first),
    # attention
    "no inverse RoPE on the output": without_inverse_rotation,
    "sink dropped": sinks_of(lambda sinks: paddle.full_like(sinks, float("-inf"))),
    "sink logit 0": sinks_of(paddle.zeros_like),
    "mscale^2 in the scale": scale_with_magnitude,
    "o-proj groups taken strided": groups_strided,
    "per-head q norm dropped": without_q_norm,
    "kv_norm dropped": without_kv_norm,
    # streams and experts
    "3 Sinkhorn rounds": three_sinkhorn_rounds,
    "mHC comb not transposed": streams_not_transposed,
    "hash routing ignored": hash_ignored,
    "router bias ignored": bias_ignored,
    "sigmoid router": sigmoid_scores,
    "routed scaling dropped": without_scaling,
    "swiglu_limit ignored": without_limit,
}

SCORE_MISTAKES: dict[str, Mistake] = {
    "no index_n_heads^-0.5": folded_times(lambda config: config.index_n_heads**0.5),
    "no index_head_dim^-0.5": folded_times(lambda config: config.index_head_dim**0.5),
}
