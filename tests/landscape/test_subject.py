import pytest
import torch
from strategies import random_network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from meanfield import Architecture, Conv, landscape
from meanfield.landscape.objective import Objective, batches
from meanfield.subject import Subject
from meanfield.validation import Misuse


def small(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)]
    return nn.Sequential(*layers).double()


IMAGES, LABELS = torch.rand(20, 1, 6, 6, dtype=torch.float64), torch.arange(20) % 4


def test_a_module_answers_as_it_is_and_as_its_copy_elsewhere():
    network, subject = small(0), Subject(small(0))
    assert torch.equal(subject(subject.parameters, IMAGES), network.eval()(IMAGES))
    moved = {name: 1.1 * tensor for name, tensor in subject.parameters.items()}
    assert torch.equal(subject(moved, IMAGES), subject.at(moved)(IMAGES))
    assert torch.equal(subject(subject.parameters, IMAGES), network(IMAGES))


def test_particles_answer_as_they_are_with_their_masses_kept():
    architecture = Architecture((1, 5, 5), (Conv(3, activation="tanh", bias=True), Conv(2)), "flatten", outputs=2)
    network = random_network(architecture, (4, 3), seed=1)
    inputs = torch.rand(5, *network.architecture.input_shape, dtype=torch.float64)
    subject = Subject(network)
    assert torch.equal(subject(subject.parameters, inputs), network(inputs))
    moved = {name: 1.1 * tensor for name, tensor in subject.parameters.items()}
    assert torch.equal(subject(moved, inputs), subject.at(moved)(inputs))
    assert torch.equal(subject.at(moved).masses[1], network.masses[1])


def test_particles_are_copied():
    network = random_network(Architecture((1, 5, 5), (Conv(3),), "flatten", outputs=2), (4,), seed=1)
    subject = Subject(network)
    before = subject.at(subject.parameters)
    kept = [tensor.clone() for tensor in before.tensors()]
    for tensor in network.tensors():
        tensor.mul_(2)
    assert all(torch.equal(*pair) for pair in zip(subject.at(subject.parameters).tensors(), kept))


def test_the_mean_loss_is_that_of_all_images_however_they_come():
    subject = Subject(small(0))
    whole = nn.functional.cross_entropy(subject.network(IMAGES), LABELS)
    loader = [(IMAGES[:13], LABELS[:13]), (IMAGES[13:], LABELS[13:])]
    for objective in (Objective(subject, IMAGES, LABELS), Objective(subject, loader)):
        assert float(objective(subject.parameters)) == pytest.approx(float(whole), rel=1e-14)
        assert objective.score(subject.parameters).loss == pytest.approx(float(whole), rel=1e-14)
    averaged = Objective(subject, loader, loss=nn.functional.cross_entropy)
    assert float(averaged(subject.parameters)) == pytest.approx(float(whole), rel=1e-14)


def test_what_is_not_alike_is_refused_by_name():
    with pytest.raises(Misuse, match=r"other='4.weight' is torch.float64 of shape \(4, 12\)"):
        Subject(small(0)).sibling(nn.Sequential(*small(1)[:4], nn.Linear(12, 4).double()), "other")
    with pytest.raises(TypeError, match="network must be a torch"):
        Subject(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(Misuse, match="targets="):
        Objective(Subject(small(0)), IMAGES, LABELS[:3])
    with pytest.raises(Misuse, match="class indices"):
        Objective(Subject(small(0)), IMAGES, torch.rand(20, 4))
    assert landscape.plane(small(0), seed=1).origin["0.weight"].shape == (3, 1, 3, 3)


def test_a_module_called_twice_and_a_tied_weight_move_and_the_copy_stays_whole():
    torch.manual_seed(0)
    twice, tied = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
    tied.weight = twice.weight
    network = nn.Sequential(twice, nn.Tanh(), twice, tied, nn.Flatten()).double()
    subject = Subject(network)
    moved = {name: 1.1 * tensor for name, tensor in subject.parameters.items()}
    assert sorted(moved) == ["0.bias", "0.weight", "3.bias"]
    found = subject(moved, IMAGES)
    assert all(type(each) is nn.Parameter for each in subject.network.parameters())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1.1
    assert torch.equal(found, network(IMAGES))
    assert torch.equal(found, subject.at(moved)(IMAGES))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_takes_no_random_number_of_the_callers(shuffle):
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=7, shuffle=shuffle)
    before = torch.get_rng_state()
    assert sum(len(inputs) for inputs, _ in batches(loader)) == 20
    assert torch.equal(torch.get_rng_state(), before)


class Functional(nn.Module):
    """A linear layer and what is made of its outputs."""

    def __init__(self, after):
        super().__init__()
        self.linear, self.after = nn.Linear(36, 4).double(), after

    def forward(self, inputs):
        return self.after(self.linear(inputs.flatten(1)))


def test_a_network_that_draws_or_gives_no_tensor_is_refused_and_nothing_is_drawn():
    random, several = Functional(nn.functional.dropout), Functional(lambda outputs: (outputs, outputs))
    before = torch.get_rng_state()
    with pytest.raises(Misuse, match="network='Functional' draws random numbers in evaluation mode"):
        Objective(Subject(random), IMAGES, LABELS)
    with pytest.raises(Misuse, match="network='tuple' came back: it must give one tensor"):
        Objective(Subject(several), IMAGES, LABELS)
    landscape.plane(random)  # whose warnings call the functions of the pass
    assert torch.equal(torch.get_rng_state(), before)


def test_a_summed_loss_is_refused_and_labels_are_integers_of_any_size():
    subject = Subject(small(0))
    with pytest.raises(Misuse, match="loss='a sum' came back"):
        Objective(subject, IMAGES, LABELS, lambda *pair: nn.functional.cross_entropy(*pair, reduction="sum"))
    wide, narrow = Objective(subject, IMAGES, LABELS), Objective(subject, IMAGES, LABELS.to(torch.int32))
    assert narrow.score(subject.parameters) == wide.score(subject.parameters)
