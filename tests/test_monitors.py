"All monitors at once, in every kind of application, and what one of them says of another callback"

import pytest, torch
from fastai.learner import Learner
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.rows import RowFile
from common import fit, learner
from settings import SETTINGS

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

@pytest.mark.parametrize('name', SETTINGS)
def test_in_every_setting(name, tmp_path):
    "The same weights as without, every kind of row, and one page"
    plain,learn = (fit(SETTINGS[name](), 1, cbs=cbs) for cbs in ([], monitors(every=1)))
    assert all(map(torch.equal, plain.model.parameters(), learn.model.parameters()))
    run = read_log()
    kinds = {o['kind'] for o in run.rows}
    assert run.status=='finished' and len(run.epochs)==1 and {'step','layers','activations'}<=kinds
    assert len(list((tmp_path/'runs').glob('*.html')))==1

def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    "Each says so in a line, and the run goes on"
    (tmp_path/'runs').write_text('a file')
    fit(learner(cbs=monitors()), 1)
    said = capsys.readouterr().out
    assert said.count('writes no log')==1 and 'writes no report' not in said

@pytest.mark.parametrize('cb,weights', [(EMA, ['ema','ema']), (lambda: EMA(validate='raw'), ['raw','raw']),
                                        (lambda: SWA(start=.5), ['raw','swa'])])
def test_the_log_says_which_weights_were_validated(cb, weights):
    fit(learner(), 2, cbs=[cb(), RunLog()])
    assert read_log().epochs.weights.tolist()==weights

def test_without_an_average_there_is_no_such_column():
    fit(learner(), 1, cbs=RunLog())
    assert 'weights' not in read_log().epochs

def test_a_resumed_fit_begins_where_it_began(tmp_path):
    at = dict(fit=0, t=0., step=0)
    RowFile(tmp_path/'a.jsonl').add(
        dict(kind='start') | at, dict(kind='fit', n_epoch=2, facts={}) | at,
        dict(kind='step', loss=1., epoch=0, batch=0) | at | dict(step=5),
        dict(kind='rewind', epoch_open=False) | at | dict(step=5),
        dict(kind='fit', n_epoch=2, facts={}) | at | dict(step=5, t=9.))
    fits = read_log(tmp_path).fits
    assert [(o['step'],o['t']) for o in fits]==[(0,0.)]

# --- learners of one's own ----------------------------------------------------------------------
class OwnLearner(Learner):
    "Trains a batch in its own way, without events"
    def _do_one_batch(self):
        self.pred = self.model(*self.xb)
        self.loss_grad = self.loss_func(self.pred, *self.yb)
        self.loss = self.loss_grad.clone()
        if self.training:
            self.loss_grad.backward()
            self.opt.step()
            self.opt.zero_grad()

def test_a_monitor_that_cannot_work_says_so(capsys):
    learn = learner()
    own = OwnLearner(learn.dls, learn.model, loss_func=learn.loss_func, opt_func=learn.opt_func)
    fit(own, 4, cbs=(cbs := monitors(every=1)))
    said = capsys.readouterr().out
    why = 'OwnLearner has its own _do_one_batch'
    for name in ('layer_stats','activation_stats'): assert f'{name}: has measured nothing' in said
    assert 'throughput: cannot tell forward, backward and optimizer apart' in said and said.count(why)>=3
    assert next(cb for cb in cbs if isinstance(cb, Throughput)).verdict.part not in ('optimizer','callbacks')

@pytest.mark.parametrize('rates,told', [(slice(1e-5,1e-3), False), (1e-3, False)])
def test_groups_with_other_rates_are_no_alarm(rates, told, capsys):
    parts = lambda m: [list(o.parameters()) for o in (m[:3], m[3:6], m[6:])]
    fit(learner(cbs=LayerStats(1), splitter=parts), 3, 'fit_one_cycle', lr_max=rates)
    assert ('changes fast' in capsys.readouterr().out)==told

def test_fastais_default_of_activation_stats_measures_each_batch():
    fit(learner(cbs=(stats := ActivationStats(every=None))), 1)
    assert len(stats.stats)==4

def test_a_loss_that_is_nan_comes_first():
    learn = learner()
    for p in learn.model[0].parameters(): p.data.fill_(float('nan'))
    fit(learn, 1, cbs=RunLog())
    first = report('runs').read_text().split('<li>')[1]
    assert first.startswith('The run has finished, after 1 epoch. train_loss and valid_loss ended as NaN')
