"The best models: which are kept, whose files are deleted, what is loaded where, what is said if it cannot be"
import contextlib, errno, io, json, os, pickle
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch
from fastai.basics import Adam, Callback, CancelFitException, OptimWrapper, rmse
from fastai.callback.all import SaveModelCallback
from fastai.learner import ValueMetric
from torch import nn
from fastai_callbacks_ext.all import Checkpoint, SaveTopK
from fastai_callbacks_ext.base.passes import refresh_batchnorm
from fastai_callbacks_ext.test_utils import digits_learner, digits_model
from common import quiet

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

def digits(*cbs, n=250, **kwargs): return digits_learner(list(cbs), n=n, bs=32, path='.', **kwargs)

def fit(learn, n=3, lr=1e-2, **kwargs):
    with quiet(learn), contextlib.redirect_stdout(io.StringIO()) as out: learn.fit(n, lr, **kwargs)
    return out.getvalue()

def files(): return sorted(str(o.relative_to('models')) for o in Path('models').rglob('*') if o.is_file())
def weights(learn): return torch.cat([p.detach().cpu().flatten() for p in learn.model.parameters()])

def test_top_k():
    learn = digits()
    kept = {}
    class Keep(Callback):
        order = 70
        def after_epoch(self): kept[self.epoch] = {k:v.clone() for k,v in self.model.state_dict().items()}
    cb = SaveTopK('valid_loss', k=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(5, 5e-2, cbs=[cb, Keep()])
    losses = [v[1] for v in learn.recorder.values]
    order = sorted(range(5), key=lambda i: losses[i])
    assert [(o['epoch'], o['value']) for o in cb.best]==[(i, losses[i]) for i in order[:2]]
    same = lambda state: all(torch.equal(v.cpu(), kept[order[0]][k].cpu()) for k,v in state.items())
    assert same(learn.model.state_dict())
    assert json.loads(Path('models/model/best.json').read_text())=={'monitor': 'valid_loss', 'best': cb.best}
    assert files()==sorted(['model.pth', 'model/best.json', *(o['file'] for o in cb.best)])
    other = digits()
    for name in ('model', cb.best[0]['file'][:-4]): assert same(other.load(name).model.state_dict())

@pytest.mark.parametrize('ending', [KeyboardInterrupt, OSError('broken'), CancelFitException])
def test_best_after_interruption(ending):
    class End(Callback):
        def before_batch(self):
            if self.epoch==3: raise ending
    learn = digits(SaveTopK('accuracy', k=1), End())
    with contextlib.suppress(KeyboardInterrupt, OSError): fit(learn, 5)
    best = learn.save_top_k.best[0]['value']
    assert best==max(v[-1] for v in learn.recorder.values)
    with learn.no_bar(): assert learn.validate()[1]==pytest.approx(best)

def test_nan_is_never_best(capsys):
    class Spoil(Callback):
        order = 51
        def after_validate(self):
            if self.epoch in bad: self.recorder.loss.total = torch.tensor(float('nan'))
    for bad,left in (({0,2}, {1,3}), ({0,1,2,3}, set())):
        learn = digits(SaveTopK(k=4), Spoil())
        with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-2)
        assert {o['epoch'] for o in learn.save_top_k.best}==left
    assert capsys.readouterr().out.count('no model to load: valid_loss was nan in 4 epochs')==1

def test_validate_and_lr_find_leave_the_best_alone():
    learn = digits(SaveTopK(k=1))
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
        files = {o:o.read_bytes() for o in Path('models').rglob('*') if o.is_file()}
        best = list(learn.save_top_k.best)
        for p in learn.model.parameters(): p.data.mul_(0)
        learn.validate(), learn.get_preds(), learn.lr_find(num_it=5, show_plot=False, suggest_funcs=None)
    assert all(p.abs().sum()==0 for p in learn.model.parameters()) and learn.save_top_k.best==best
    assert all(o.read_bytes()==c for o,c in files.items())

def test_top_k_arguments():
    learn = digits(SaveTopK('valid_acc'))
    with pytest.raises(ValueError, match='no metric .valid_acc.; there are: train_loss, valid'): fit(learn)
    assert not Path('models').exists()
    with pytest.raises(ValueError, match='comp='): SaveTopK(comp=max)
    signs = dict(valid_loss=1, error_rate=1, accuracy=-1, _rmse=1)
    for monitor,sign in signs.items(): assert SaveTopK(monitor).sign==sign
    assert SaveTopK('valid_loss', comp=np.greater).sign==-1

def test_min_delta_and_all():
    learn = digits(SaveTopK('accuracy', k=1, min_delta=2.))
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    assert [o['epoch'] for o in learn.save_top_k.best]==[0]
    learn = digits(SaveTopK(k=None, fname='all'))
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2)
        assert len(list(Path('models/all').glob('*.pth')))==3
        learn.save_top_k.reset_on_fit = False
        learn.fit(2, 1e-2)
    assert len(learn.save_top_k.best)==5==len(list(Path('models/all').glob('*.pth')))

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_with_opt(opt_func):
    learn = digits(SaveTopK(k=1, with_opt=True), opt_func=opt_func)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    other = digits(opt_func=opt_func)
    other.create_opt()
    other.load('model', with_opt=True)
    with other.no_bar(), other.no_logging(): other.fit(1)

def test_a_best_file_that_is_gone(capsys):
    learn = digits(SaveTopK('accuracy', k=2, load_best=False))
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    (Path('models')/learn.save_top_k.best[0]['file']).unlink()
    learn.save_top_k._load_best()
    assert ': missing' in capsys.readouterr().out
    with learn.no_bar(): assert learn.validate()[1]==pytest.approx(learn.save_top_k.best[1]['value'])

def test_failed_save_of_the_best(monkeypatch, capsys):
    def fsync(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', fsync)
    learn = digits(SaveTopK(k=2))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    out = capsys.readouterr().out
    assert out.count('save_top_k: could not save')==1 and 'No space left' in out and learn.save_top_k.best==[]

def test_average():
    "The mean of the weights; batch norm has the statistics of the training set under that mean"
    learn = digits(SaveTopK(k=3))
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 1e-2)
    states = [torch.load(Path('models')/o['file'], map_location='cpu') for o in learn.save_top_k.best]
    learn.save_top_k.average()
    for k,v in learn.model.named_parameters():
        assert torch.allclose(v.cpu(), torch.stack([s[k] for s in states]).mean(0), atol=1e-7)
    learn.save_top_k.average(k=1)
    for k,v in learn.model.named_parameters(): assert torch.equal(v.cpu(), states[0][k])
    # a full batch in float64 gives the statistics in closed form
    x = torch.cat([b[0] for b in learn.dls.train])
    with torch.no_grad(): first = learn.model[0](x)
    refresh_batchnorm(learn)
    assert torch.allclose(learn.model[1].running_mean, first.mean((0,2,3)), atol=2e-2)
    learn = digits()
    cb = SaveTopK(k=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=cb)
    with pytest.raises(ValueError, match='learn=None'): cb.average()
    cb.average(learn=learn)
    with pytest.raises(ValueError, match='no model can be read'): SaveTopK().average(learn=learn)

# Which way is better, and what is no value
def regression(metrics, *cbs):
    "A learner whose error goes down"
    from fastai.basics import DataLoader, DataLoaders, Learner, MSELossFlat
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=g)
    b = list(zip(x, 3*x.sum(1, keepdim=True)))
    torch.manual_seed(0)
    dls = DataLoaders(DataLoader(b[:100], bs=20), DataLoader(b[100:], bs=20))
    return Learner(dls, nn.Linear(5,1), loss_func=MSELossFlat(), metrics=metrics, cbs=list(cbs), path='.')

def test_smaller_errors_are_better():
    out = fit(regression(rmse, cb := SaveTopK('_rmse', k=1)))
    assert cb.best[0]['epoch']==2 and not out

def test_an_assumption_is_said_once():
    for comp,said in ((None,1), (np.less,0)):
        learn = regression([ValueMetric(lambda: 1., 'mine')], SaveTopK('mine', comp=comp))
        out = fit(learn)+fit(learn)
        assert out.count("save_top_k: treats larger as better in 'mine'; if not: comp=np.less")==said

def test_epochs_without_a_value():
    "Neither saved nor counted against anything; the reasons are told where nothing was saved"
    values = {1: .5, 2: float('nan'), 4: .7}
    learn = digits(SaveTopK('score', k=None), metrics=ValueMetric(lambda: values.get(learn.epoch), 'score'))
    assert not fit(learn, 6) and [o['epoch'] for o in learn.save_top_k.best]==[4,1]
    values = {1: float('nan')}
    assert 'no model to load: score was not computed in 2 epochs, score was nan in 1 epoch\n' in fit(learn, 3)

def test_why_there_is_no_model():
    class Interrupt(Callback):
        def before_batch(self): raise KeyboardInterrupt
    learn = digits(cb := SaveTopK())
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(KeyboardInterrupt), quiet(learn):
        learn.fit(1, cbs=Interrupt())
    assert out.getvalue()=='save_top_k: no model to load: no epoch was finished\n'
    class Spoil(Callback):
        order = 3000
        def after_epoch(self):
            for f in Path('models/model').glob('*.pth'): f.write_bytes(b'')
    assert 'no model to load: none of the 2 that were saved can be read' in fit(learn, 2, cbs=Spoil())

# Whose files
def test_own_files_only():
    "What the user has put there, with any name, and what another run has written, stays as it is"
    Path('models/model').mkdir(parents=True)
    names = 'model/paper_version.pth','model/0001.pth','model/0002-abcdef.pth','other.pth'
    theirs = {f: os.urandom(8) for f in names}
    for f,b in theirs.items(): (Path('models')/f).write_bytes(b)
    first,second = SaveTopK(k=1),SaveTopK(k=1)
    learn = digits()
    assert '3 in models/model are not from this run' in fit(learn, 3, cbs=first)
    best = weights(learn)
    for _ in range(2): fit(learn, 2, cbs=second)      # its second fit takes the place of its first
    own = [cb.best[0]['file'] for cb in (first, second)]
    assert files()==sorted([*theirs, *own, 'model.pth', 'model/best.json'])
    assert all((Path('models')/f).read_bytes()==b for f,b in theirs.items())
    learn.load(own[0].removesuffix('.pth'))
    assert torch.equal(weights(learn), best)

def test_own_files_after_a_restart():
    "A run that goes on removes what it wrote before it was stopped, also after its last checkpoint"
    class Stop(Callback):
        order = 3000
        def before_batch(self):
            if self.epoch==3: raise SystemExit
    with pytest.raises(SystemExit): fit(digits(), 6, cbs=[SaveTopK(k=1), Checkpoint('run', steps=10), Stop()])
    cb = SaveTopK(k=1)
    fit(digits(), 6, cbs=[cb, Checkpoint('run', steps=10)])
    assert files()==sorted([cb.best[0]['file'], 'model.pth', 'model/best.json'])

def test_saving_under_the_same_name_harms_no_model():
    learn = digits(SaveTopK(k=1))
    fit(learn)
    best = weights(learn)
    for p in learn.model.parameters(): p.data.zero_()
    learn.save('model')
    learn.save_top_k._load_best()
    assert torch.equal(weights(learn), best)

@pytest.mark.parametrize('other', [SaveTopK, SaveModelCallback])
@pytest.mark.parametrize('swap', [False,True])
def test_two_that_write_the_same_files(other, swap):
    cbs = [SaveTopK('accuracy'), other()]
    learn = digits(*(cbs[::-1] if swap else cbs))
    with pytest.raises(ValueError, match="fname='model': .* on the learner.*give each an fname of its own"):
        fit(learn)
    assert files()==[]
    learn.remove_cb(cbs[1])
    fit(learn, 2, cbs=[other(fname='other'), SaveModelCallback(every_epoch=True)])
    assert {'model.pth','other.pth','model_1.pth'}<=set(files())

class Wide(nn.Sequential):
    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10))

def test_another_model_has_other_best_ones():
    "The best of the model before are forgotten, and their files left alone"
    cb = SaveTopK(reset_on_fit=False)
    first = digits(model=torch.compile(digits_model(), backend='eager'))
    fit(first, 1, cbs=cb)
    first.model = first.model._orig_mod          # the same model
    assert 'forgot' not in fit(first, 1, cbs=cb) and len(cb.best)==2
    old = set(files())-{'model.pth','model/best.json'}
    second = digits(cb, model=Wide())
    out = fit(second, 1)
    for o in ('save_top_k: forgot the best value of the previous fit', 'that was another model'):
        assert out.count(o)==1
    assert len(cb.best)==1 and old<set(files())
    with quiet(second): assert second.validate()[0]==pytest.approx(cb.best[0]['value'])
    second.remove_cb(cb)
    again = pickle.loads(pickle.dumps(cb))
    fit(second, 1, cbs=again)
    assert len(again.best)==2

# Whatever the model is wrapped in, and has in it
def test_compiled():
    for with_opt in (False, True):
        learn = digits(SaveTopK(k=2, with_opt=with_opt), model=torch.compile(digits_model(), backend='eager'))
        fit(learn)
        best = weights(learn)
        for p in learn.model.parameters(): p.data.zero_()
        learn.load('model', with_opt=with_opt)
        assert torch.equal(weights(learn), best)
        learn.save_top_k.average(k=1)
        assert torch.equal(weights(learn), best)
        plain = digits()       # as when the run goes on without being compiled
        plain.create_opt()
        plain.add_cb(cb := SaveTopK(with_opt=with_opt))
        cb.best,cb._models = learn.save_top_k.best,Path('models')
        cb._load_best()
        assert torch.equal(weights(plain), best)

class Odd(nn.Linear):
    "Has a state that no file can hold without code"
    def get_extra_state(self): return self.extra
    def set_extra_state(self, state): assert state is self.extra

def test_a_state_that_cannot_be_saved():
    model = digits_model()
    model.odd = Odd(10, 10)
    model.odd.extra = object()
    learn = digits(SaveTopK(), model=model)
    out = fit(learn)
    assert out.count('save_top_k: left out')==1 and "state['odd._extra_state']" in out
    assert len(learn.save_top_k.best)==3
    with quiet(learn): assert learn.validate()[0]==pytest.approx(learn.save_top_k.best[0]['value'])

@pytest.mark.parametrize('block', ['models', 'models/model/best.json', 'models/model.pth'])
def test_what_cannot_be_written_ends_no_fit(block):
    if block=='models': Path(block).touch()
    else: (Path(block)/'x').mkdir(parents=True)
    learn = digits(SaveTopK(k=1))
    out = fit(learn)
    assert len(learn.recorder.values)==3 and out.count('could not save')==1
    if block=='models': assert 'no model to load: the model could not be saved in 3 epochs' in out
    else: assert len(list(Path('models/model').glob('*-*.pth')))==1 and 'no model' not in out
