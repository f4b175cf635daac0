# SPDX-License-Identifier: Apache-2.0
"""peers_cuda gives each of our lines the time of the peer's same step, and measures a step once."""

import types
import unittest
from unittest import mock

try:
    import torch  # noqa: F401
except ImportError as error:
    raise unittest.SkipTest("needs PyTorch") from error

import peers_cuda
import published_peer

SHAPE = {"batch": 1, "heads_q": 32, "heads_kv": 2, "head_dim": 128, "tokens": 8192, "blocks": 96}


def line(name, ms=2.0, **changes):
    return {"name": name, "shape": SHAPE, "input": "random", "ms": ms, **changes}


class PublishedTest(unittest.TestCase):
    def setUp(self):
        module = types.SimpleNamespace(__version__="0.1.0")
        self.use(published_peer, "load", lambda: module)
        self.use(published_peer, "version", lambda of: of.__version__)
        self.forward = self.use(peers_cuda, "published_forward", mock.Mock(
            return_value=dict(zip(peers_cuda.FORWARD, (1.0, 2.0, 3.0, 7.0)))))
        self.decode = self.use(peers_cuda, "published_decode",
                               mock.Mock(side_effect=RuntimeError("no such shape")))
        self.use(peers_cuda.torch.cuda, "empty_cache", lambda: None)
        self.peers = peers_cuda.Peers([peers_cuda.PUBLISHED])

    def use(self, place, name, value):
        patch = mock.patch.object(place, name, value)
        self.addCleanup(patch.stop)
        return patch.start()

    def times(self, record):
        return [(r.get("peer"), r.get("peer_ms"), r.get("ratio"), r.get("peer_version"))
                for r in peers_cuda.with_peers(record, self.peers)]

    def test_each_step_gets_its_own_time(self):
        for name, ms in zip(peers_cuda.FORWARD, (1.0, 2.0, 3.0, 7.0)):
            self.assertEqual(self.times(line(name)), [("infllm_v2", ms, ms / 2, "0.1.0")])
        self.assertEqual(self.forward.call_count, 1)
        self.times(line("attend.forward", input="correlated-0.8"))
        self.assertEqual(self.forward.call_count, 2)
        self.assertEqual(self.forward.call_args.args[1:], (SHAPE, "correlated-0.8"))

    def test_lines_that_it_cannot_do_stay_as_they_are(self):
        alone = [(None, None, None, None)]
        self.assertEqual(self.times(line("attention.decode")), alone)
        self.assertEqual(self.decode.call_count, 1)
        self.assertEqual(self.times(line("attend.forward", input="trace")), alone)
        self.assertEqual(self.times(line("dense.forward")), alone)
        longer = {**SHAPE, "tokens": 2 * peers_cuda.PUBLISHED_LIMIT}
        self.assertEqual(self.times(line("attend.forward", shape=longer)), alone)

    def test_our_own_dense_peer_stays_beside_it(self):
        record = line("attention.forward", peer="dense", peer_ms=4.0, ratio=2.0)
        self.assertEqual(self.times(record), [("dense", 4.0, 2.0, None), ("infllm_v2", 7.0, 3.5, "0.1.0")])


if __name__ == "__main__":
    unittest.main()
