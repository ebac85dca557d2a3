import torch

from dualsft.trainer import _fresh_casts


def test_a_change_of_weights_shows_under_autocast() -> None:
    """Within one autocast context, a weight that was changed after its first use is cast anew."""
    linear = torch.nn.Linear(2, 2, bias=False)
    ones = torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16), _fresh_casts(torch.device("cpu")):
        before = linear(ones).detach()
        with torch.no_grad():
            linear.weight.add_(1.0)
        after = linear(ones).detach()
    torch.testing.assert_close(after - before, torch.full((1, 2), 2.0, dtype=torch.bfloat16), rtol=0.0, atol=0.05)


def test_nothing_is_cast_where_autocast_is_off() -> None:
    """Without autocast the context changes nothing."""
    with _fresh_casts(torch.device("cpu")):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
