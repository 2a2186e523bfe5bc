"""launch/torchrun.sh on two nodes; this run is the undisturbed one that the SLURM jobs must equal."""

import runs


def test_two_nodes_train_and_listen_on_one_interface_only(undisturbed):
    run, listening = undisturbed
    history = runs.history(run)
    assert [step for step, _ in history["kl loss"]] == list(range(1, 25))
    assert history["kl loss"][-1][1] < 0.8 * history["kl loss"][0][1]
    # (The rendezvous, the workers' store, gloo's pairs of ranks.)
    assert len(listening) >= 4, listening
    strangers = [address for address in listening if not address.startswith(("10.231.77.", "127."))]
    assert not strangers, f"open to every network: {strangers}"
