"""launch/torchrun.sh trains on two nodes and listens on one network interface only."""

import runs


def test_two_nodes_train_and_listen_on_one_interface_only(uninterrupted):
    run, listening = uninterrupted
    history = runs.history(run)
    assert [step for step, _ in history["kl loss"]] == list(range(1, 25))
    # Means of six steps, because one batch changes the loss by a tenth and CPUs round differently. Measured: 0.85.
    losses = [loss for _, loss in history["kl loss"]]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6]), losses
    # The rendezvous, the workers' store, gloo's pairs of ranks.
    assert len(listening) >= 4, listening
    exposed = [address for address in listening if not address.startswith(("10.231.77.", "127."))]
    assert not exposed, f"open to every network: {exposed}"
