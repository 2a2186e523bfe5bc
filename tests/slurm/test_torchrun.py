"""launch/torchrun.sh on two nodes; this run is the undisturbed one that the SLURM jobs must equal."""

import runs


def test_two_nodes_train_and_listen_on_one_interface_only(undisturbed):
    run, listening = undisturbed
    history = runs.history(run)
    assert [step for step, _ in history["kl loss"]] == list(range(1, 25))
    # One step's batch moves the loss by a tenth, and CPUs round differently: means of six. Seen: 0.85.
    losses = [loss for _, loss in history["kl loss"]]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6]), losses
    # (The rendezvous, the workers' store, gloo's pairs of ranks.)
    assert len(listening) >= 4, listening
    strangers = [address for address in listening if not address.startswith(("10.231.77.", "127."))]
    assert not strangers, f"open to every network: {strangers}"
