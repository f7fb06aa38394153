"`upgrade(learn)`, and the messages that name it"
import re

from fastai.callback import rnn as fastai_rnn, tracker, training
import numpy as np, pytest, torch
from fastai.callback.all import CSVLogger, ShortEpochCallback
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.test_utils import digits_learner, text_learner
from common import fit, quiet
from settings import SETTINGS

def kinds(learn): return sorted((type(cb) for cb in learn.cbs), key=str)

def test_what_is_swapped(capsys):
    learn = digits_learner([tracker.TerminateOnNaNCallback(), training.GradientAccumulation(128),
                            training.GradientClip(.5), ShortEpochCallback(.5)], n=160)
    assert ext.upgrade(learn) is learn
    said = capsys.readouterr().out
    for new in (ext.TerminateOnNaN, ext.GradientAccumulation, ext.GradientClip):
        assert new in kinds(learn) and new.__name__ in said
    assert ShortEpochCallback in kinds(learn) and learn.gradient_accumulation.n_acc==128
    assert said.count('\n')==1
    ext.upgrade(learn)
    assert 'nothing to swap' in capsys.readouterr().out
    fit(learn)

@pytest.mark.parametrize('comp,monitor', [(None, 'valid_loss'), (np.greater, 'accuracy')])
def test_arguments_of_trackers(comp, monitor, tmp_path):
    theirs = dict(monitor=monitor, comp=comp, min_delta=.1, reset_on_fit=False)
    cbs = [tracker.EarlyStoppingCallback(patience=2, **theirs),
           tracker.SaveModelCallback(fname='best', with_opt=True, **theirs)]
    learn = digits_learner(cbs, n=160, path=tmp_path)
    ext.upgrade(learn)
    stop,save = learn.early_stopping,learn.save_top_k
    for cb in (stop, save): assert (cb.monitor, cb.min_delta, cb.reset_on_fit)==(monitor, .1, False)
    assert stop.patience==2 and (save.k, save.fname, save.with_opt)==(1, 'best', True)
    fit(learn, 2)
    assert (tmp_path/'models/best.pth').exists()

def test_what_is_left(capsys):
    "Another job, a class of the user's own, and the learner's own callbacks"
    class Mine(training.GradientClip): pass
    learn = digits_learner([tracker.SaveModelCallback(every_epoch=True), Mine(), CSVLogger()], n=160)
    before = kinds(learn)
    ext.upgrade(learn)
    said = capsys.readouterr().out
    assert kinds(learn)==sorted([*before, ext.Progress], key=str)
    assert 'left: SaveModelCallback (it saves other models than the best one)' in said

def test_ours_is_there_already():
    learn = digits_learner([training.GradientClip(.5), ext.GradientClip(.1)], n=160)
    ext.upgrade(learn)
    assert kinds(learn).count(ext.GradientClip)==1 and training.GradientClip not in kinds(learn)

def test_several_of_a_kind(tmp_path, capsys):
    "Each keeps its metric and its file"
    theirs = [tracker.SaveModelCallback(fname='by_loss'), tracker.EarlyStoppingCallback(patience=3),
              tracker.SaveModelCallback('accuracy', fname='by_accuracy'),
              tracker.EarlyStoppingCallback('accuracy', patience=2), training.GradientClip(.5),
              training.GradientClip(.1)]
    learn = ext.upgrade(digits_learner(theirs, n=160, path=tmp_path))
    new = [cb for cb in learn.cbs if type(cb).__module__.startswith('fastai_callbacks_ext')]
    assert [(type(cb).__name__, getattr(cb, 'monitor', None)) for cb in new]==[
        ('SaveTopK','valid_loss'), ('EarlyStopping','valid_loss'), ('SaveTopK','accuracy'),
        ('EarlyStopping','accuracy'), ('GradientClip',None), ('GradientClip',None), ('Progress',None)]
    assert capsys.readouterr().out.count('->')==6
    fit(learn)
    assert {o.name for o in (tmp_path/'models').glob('*.pth')}=={'by_loss.pth','by_accuracy.pth'}

def test_what_is_taken_off(capsys):
    "Only what ours on the learner does already, or what is there twice; and it says so"
    cbs = [ext.SaveTopK('accuracy'), ext.EarlyStopping('accuracy'), tracker.SaveModelCallback('accuracy'),
           tracker.EarlyStoppingCallback(), tracker.SaveModelCallback(fname='best'),
           tracker.EarlyStoppingCallback()]
    learn = ext.upgrade(digits_learner(cbs, n=160))
    assert capsys.readouterr().out==(
        'upgrade: EarlyStoppingCallback -> EarlyStopping, SaveModelCallback -> SaveTopK, '
        'ProgressCallback + Progress; '
        'taken off, the learner has ours: SaveModelCallback, EarlyStoppingCallback\n')
    assert [(cb.fname, cb.monitor) for cb in learn.cbs if isinstance(cb, ext.SaveTopK)]==[
        ('model','accuracy'), ('best','valid_loss')]
    assert [cb.monitor for cb in learn.cbs if isinstance(cb, ext.EarlyStopping)]==['accuracy','valid_loss']

def follow(message):
    "Do what a message says, to the letter"
    code = re.search(r'from fastai_callbacks_ext.*', message).group()
    return lambda learn: exec(code, {'learn': learn})

@pytest.mark.parametrize('cbs', [(2, 1), (0, 0), (3, 1)], ids=str)
def test_beside_fastais(cbs):
    "The learner of fastai refuses ours; what the message says makes the same line work"
    learn = SETTINGS['language_model']()
    had = kinds(learn)
    for refused in range(3):
        try: fit(learn, cbs=ext.rnn_cbs(*cbs))
        except ValueError as e:
            if not refused: assert kinds(learn)==had
            follow(str(e))(learn)
        else: break
    assert refused==(2 if cbs==(3, 1) else 1) and learn.recorder.values[-1][0]<10

def test_two_of_ours_count_once():
    def values(*cbs):
        learn = text_learner(ext.rnn_cbs(2, 1), n=1000)
        return fit(learn, cbs=list(cbs)).recorder.values
    assert values(*ext.rnn_cbs(2, 1))==values()

ours = dict(callback=ext.RNNCallback, regularizer=lambda: ext.RNNRegularizer(1))
@pytest.mark.parametrize('cb', ours.values(), ids=ours)
def test_refusal_changes_nothing(cb):
    learn = text_learner(fastai_rnn.rnn_cbs(1), n=1000)
    had,before = kinds(learn),{n: p.clone() for n,p in learn.model.state_dict().items()}
    with quiet(learn), pytest.raises(ValueError, match=r"swap fastai's callbacks .* upgrade\(learn\)"):
        learn.fit(1, cbs=cb())
    assert kinds(learn)==had and all(torch.equal(p, before[n]) for n,p in learn.model.state_dict().items())
    fit(learn)
