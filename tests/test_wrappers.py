"Models inside DataParallel, DistributedDataParallel and torch.compile"
import gc

import pytest, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.base.model import resettable, unwrap_model
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner
from common import fit

@pytest.fixture
def alone(tmp_path):
    "A process group of one"
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    gc.collect()        # a group that a data worker inherits, and collects, ends it

@pytest.fixture
def fastai_distributed(monkeypatch):
    "What `fastai.distributed` does to the wrappers: a `reset` that does nothing for a model that has none"
    def reset(self):
        if hasattr(self.module, 'reset'): self.module.reset()
    for cls in DataParallel,DistributedDataParallel: monkeypatch.setattr(cls, 'reset', reset, raising=False)

def compiled(m): return torch.compile(m, backend='eager')
wrappers = dict(dp=DataParallel, ddp=DistributedDataParallel, compiled=compiled,
                compiled_ddp=lambda m: compiled(DistributedDataParallel(m)),
                ddp_compiled=lambda m: DistributedDataParallel(compiled(m)))
each = pytest.mark.parametrize('wrap', wrappers.values(), ids=wrappers)

class Nested(nn.Module):
    "A model without `reset`, with one inside that has it"
    def __init__(self, inner): super().__init__(); self.inner = inner
    def forward(self, x): return self.inner(x)

class Plain(nn.Module):
    "A language model that returns no triple"
    def __init__(self, n):
        super().__init__()
        self.embed,self.rnn,self.head = nn.Embedding(n, 16),nn.GRU(16, 16, batch_first=True),nn.Linear(16, n)
    def forward(self, x): return self.head(self.rnn(self.embed(x))[0])

@each
@pytest.mark.parametrize('nested', [False, True])
def test_reset(alone, fastai_distributed, wrap, nested):
    learn = text_learner(ext.rnn_cbs(2, 1), n=1000)
    model = learn.model
    learn.model = wrap(Nested(model) if nested else model)
    assert resettable(learn.model)==[model]
    assert isinstance(unwrap_model(learn.model), Nested if nested else type(model))
    fit(learn)
    assert all(h.abs().max()==0 for pair in model[0].hidden for h in pair)

@each
def test_regularize_module(alone, wrap):
    "The penalties are found inside the wrapper, and are those of the bare model"
    def run(wrap):
        torch.manual_seed(0)
        learn = text_learner(ext.RNNRegularizer(2, 1, module='rnn'), n=1000)
        learn.model = wrap(Plain(len(learn.dls.vocab)))
        return list(fit(learn).recorder.values[0])
    assert run(wrap)==pytest.approx(run(lambda m: m), rel=1e-4)

@each
def test_nan(alone, wrap):
    learn = digits_learner([ext.TerminateOnNaN(), PoisonBatch(1, 'input')], n=200)
    learn.model = wrap(learn.model)
    fit(learn)
    assert len(learn.terminate_on_nan.records)==1
    assert all(t.isfinite().all() for t in learn.model.state_dict().values())
