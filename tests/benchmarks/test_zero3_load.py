# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Loading under ZeRO-3 in two processes: what each of them needs while it loads, and what it keeps."""

import pytest

from helpers.distributed import needs_compiler


pytestmark = needs_compiler


@pytest.mark.slow
def test_no_rank_holds_the_whole_model_while_it_is_shared_out(tmp_path):
    from benchmarks import zero3_load  # needs DeepSpeed

    size = zero3_load.save_model(str(tmp_path))
    ranks = zero3_load.measure(str(tmp_path), zero3_load.GIVE_BACK)
    for one in ranks:
        assert 0.5 * size <= one["kept"] < 0.55 * size
        assert one["anonymous"] < 0.75 * size  # a half, and twice the token embedding
    assert ranks[0]["file_backed"] < 1.05 * size  # the checkpoint, mapped once
    assert ranks[1]["file_backed"] < 0.05 * size
