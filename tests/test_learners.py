"Learners of fastai's applications as people run them: bar and table on, callbacks of several kinds together"
import contextlib, io

import pytest, torch
import fastai_callbacks_ext.all as ext
from settings import SETTINGS

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def guards(): return [ext.SkipNonFinite(), ext.GradientClip(1.), ext.FastLoop()]
def saves(): return [ext.SaveTopK(), ext.EarlyStopping(patience=5), ext.TerminateOnNaN()]
def averages(): return [ext.EMA(.9), ext.SpikeGuard()]
def limits(): return [ext.StepLimit(1000), ext.TimeLimit(60), ext.GradientAccumulation(32)]

CALLBACKS = dict(digits=averages, classifier=guards, multi_label=guards, unet=averages, tabular_classes=saves,
                 ratings=limits, language_model=guards, text_classifier=saves, torch_loader=averages,
                 list_of_batches=guards, gan=lambda: [ext.TerminateOnNaN()])

def finite(learn): return all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.parametrize('name', SETTINGS)
def test_trains(name, tmp_path):
    "The table has a line an epoch, the weights are finite, and nothing acted that had no reason to"
    learn = SETTINGS[name]()
    learn.path = tmp_path
    with contextlib.redirect_stdout(said := io.StringIO()):
        ext.upgrade(learn).fit_one_cycle(2, 1e-3, cbs=[*CALLBACKS[name](), ext.StopFile('stop')])
    assert finite(learn) and len(learn.recorder.values)==2
    text = said.getvalue()
    assert 'train_loss' in text and 'skipped' not in text and 'stopped' not in text

@pytest.mark.parametrize('name', ['classifier','tabular_classes'])
def test_fine_tune_and_predict(name):
    learn = SETTINGS[name](cbs=[ext.TerminateOnNaN(valid=True), *averages()])
    with contextlib.redirect_stdout(io.StringIO()):
        learn.fine_tune(1)
        learn.fit(1)
        preds,_ = learn.get_preds()
    assert finite(learn) and preds.isfinite().all() and learn.terminate_on_nan.records==[]
    assert 'TerminateOnNaN (-9)' in repr(ext.show_order(learn))

def test_language_model():
    "fastai's callbacks are swapped for ours, which show the penalties in the table"
    with contextlib.redirect_stdout(io.StringIO()):
        learn = ext.upgrade(SETTINGS['language_model']())
        learn.fine_tune(1)
    assert learn.recorder.metric_names[-3:-1]==['ar','tar'] and finite(learn)
    learn.model.reset()
    with learn.no_bar(): assert len(learn.predict('the value of', 3, only_last_word=False).split())>=5
