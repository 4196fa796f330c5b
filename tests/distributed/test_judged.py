"""`verify` on two ranks: right loops are exact, wrong ones are named on every rank."""

import pytest

from tests.distributed import judged, launch

EXPECTED = {
    "right": ((), 0.0),
    "averaged": (("world-size factor",), 0.5),
    "rank_means": (("mean of rank means",), None),
    "one left out": (("unsynchronised parameters", "another gradient"), None),
    "ours": ((), 0.0),
    "ours uneven": ((), 0.0),
    "ours idle": ((), 0.0),
    "doubled": (("duplicated samples",), 0.0),
    "diverged": (("diverged replicas", "unsynchronised parameters", "another gradient"), None),
}


def test_verify_names_what_ranks_do_wrong():
    found = launch.values(launch.run(judged.verdicts, 2, deadline=60))
    for verdicts in found:
        assert verdicts.keys() == EXPECTED.keys()
        for name, (expected, error) in EXPECTED.items():
            is_exact, names, relative = verdicts[name]
            assert (is_exact, names) == (not expected, expected), name
            if error is not None:
                assert relative == pytest.approx(error, abs=1e-14), name
