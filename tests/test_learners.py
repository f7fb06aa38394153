"Real learners of fastai's applications, with `from fastai_callbacks_ext.all import *`"
import pandas as pd, pytest, torch
from PIL import Image
from sklearn.datasets import load_digits, load_wine
from fastai.tabular import all as tabular
from fastai.text import all as text
from fastai.vision import all as vision
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.test_utils import words
from common import quiet

def test_tabular():
    df = load_wine(as_frame=True).frame
    dls = tabular.TabularDataLoaders.from_df(df, procs=[tabular.Normalize], cont_names=list(df.columns[:-1]), y_names='target',
                                             y_block=tabular.CategoryBlock(), bs=32, num_workers=0)
    tabular.set_seed(42)
    learn = tabular.tabular_learner(dls, layers=[50], metrics=tabular.accuracy, cbs=ext.TerminateOnNaN())
    with quiet(learn): learn.fit_one_cycle(8, 1e-2)
    assert learn.recorder.values[-1][-1]>.8
    with quiet(learn): learn.predict(df.iloc[0]); learn.fit(1, cbs=ext.TerminateOnNaN(every=2))

@pytest.fixture
def pictures(tmp_path):
    "200 digits as png files, in folders named for their class"
    x,y = load_digits(return_X_y=True)
    for i in range(200):
        (tmp_path/str(y[i])).mkdir(exist_ok=True)
        Image.fromarray((x[i].reshape(8,8)*15).astype('uint8')).resize((32,32)).save(tmp_path/str(y[i])/f'{i}.png')
    return tmp_path

def test_vision(pictures):
    dls = vision.ImageDataLoaders.from_folder(pictures, valid_pct=0.2, seed=42, bs=32, num_workers=0, batch_tfms=vision.aug_transforms(do_flip=False))
    learn = vision.vision_learner(dls, vision.resnet18, pretrained=False, metrics=vision.accuracy, cbs=ext.TerminateOnNaN(valid=True))
    with quiet(learn): learn.fine_tune(1)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert learn.terminate_on_nan.records==[] and len(learn.recorder.values)==1
    with quiet(learn): assert learn.predict(next(pictures.glob('*/*.png')))[2].isfinite().all()
    assert 'TerminateOnNaN (-9)' in repr(ext.show_order(learn))

def test_text():
    "A `language_model_learner` brings fastai's callbacks; ours say so, and take their place"
    df = pd.DataFrame({'text': [' '.join(words()[i:i+200]) for i in range(0, 4000, 200)]})
    dls = text.TextDataLoaders.from_df(df, is_lm=True, text_col='text', bs=8, seq_len=20, num_workers=0)
    config = text.awd_lstm_lm_config | dict(emb_sz=32, n_hid=32, n_layers=1)
    learn = text.language_model_learner(dls, text.AWD_LSTM, config=config, pretrained=False, drop_mult=0.1)
    with quiet(learn), pytest.raises(ValueError, match="fastai's RNNCallback too"): learn.fit(1, cbs=ext.rnn_cbs(2, 1))
    learn.remove_cbs([text.ModelResetter, text.RNNCallback, text.RNNRegularizer])
    learn.add_cbs(ext.rnn_cbs(2, 1))
    with quiet(learn): learn.fine_tune(1)
    assert learn.recorder.metric_names[-3:-1]==['ar','tar'] and all(p.isfinite().all() for p in learn.model.parameters())
    learn.model.reset(); assert len(learn.predict('the value of', 3, only_last_word=False).split())>=5
