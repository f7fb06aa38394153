"Learners as people make them, one a kind of application: small, seeded, without a download, bar and table on"
import atexit, shutil, tempfile
from functools import cache
from pathlib import Path

import numpy as np, pandas as pd, torch
from PIL import Image
from sklearn.datasets import load_digits, load_wine
from torch import nn
from fastai import collab
from fastai.tabular import all as tabular
from fastai.text import all as text
from fastai.vision import all as vision, gan as gans
from fastai.torch_core import default_device, set_seed
from fastai_callbacks_ext.test_utils import digits_learner, words

SETTINGS = {}
def setting(f):
    "Add the learner that `f` makes to `SETTINGS`"
    def seeded(**kwargs):
        set_seed(42)
        learn = f(**kwargs)
        learn.model.to(getattr(learn.dls, 'device', default_device()))
        return learn
    SETTINGS[f.__name__] = seeded
    return seeded

@cache
def pictures(size=24, n=96):
    "A folder of digits as png files, in folders named for their class"
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    x,y = load_digits(n_class=4, return_X_y=True)
    for i in range(n):
        (folder/str(y[i])).mkdir(exist_ok=True)
        image = Image.fromarray((x[i].reshape(8,8)*15).astype('uint8')).resize((size,size))
        image.save(folder/str(y[i])/f'{i:03}.png')
    return folder

def small_net(pretrained=False):
    "An architecture as `vision_learner` and `unet_learner` take it"
    convs = [vision.ConvLayer(i, o, stride=2) for i,o in ((3,8), (8,16))]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1))

def two_parts(model): return [list(part.parameters()) for part in (model[0], model[1:])]

def label(path): return path.parent.name
def labels(path):
    digit = int(label(path))
    return ['odd' if digit%2 else 'even', 'small' if digit<2 else 'large']
def mask(path): return (np.array(Image.open(path))>100).astype('uint8')

def _pictures_block(block, get_y, **kwargs):
    return vision.DataBlock((vision.ImageBlock, block), get_items=vision.get_image_files, get_y=get_y,
                            splitter=vision.RandomSplitter(seed=42), **kwargs)

def _loaders(block, num_workers=0): return block.dataloaders(pictures(), bs=16, num_workers=num_workers)

def _vision_learner(dls, **kwargs):
    return vision.vision_learner(dls, small_net, pretrained=False, splitter=two_parts, lin_ftrs=[16],
                                 **kwargs)

@setting
def digits(**kwargs): return digits_learner(n=320, **kwargs)

@setting
def classifier(**kwargs):
    "`vision_learner` with random resizing and augmentation, and two workers"
    block = _pictures_block(vision.CategoryBlock, label, item_tfms=vision.RandomResizedCrop(24, min_scale=.8),
                            batch_tfms=vision.aug_transforms(do_flip=False))
    return _vision_learner(_loaders(block, 2), metrics=vision.accuracy, **kwargs)

@setting
def multi_label(**kwargs):
    "Several labels an image, and `MixUp`"
    block = _pictures_block(vision.MultiCategoryBlock, labels)
    cbs = [vision.MixUp(), *kwargs.pop('cbs', [])]
    return _vision_learner(_loaders(block), metrics=vision.accuracy_multi, cbs=cbs, **kwargs)

@setting
def unet(**kwargs):
    block = _pictures_block(vision.MaskBlock(codes=['paper','ink']), mask)
    return vision.unet_learner(_loaders(block), small_net, pretrained=False, splitter=two_parts,
                               metrics=vision.foreground_acc, **kwargs)

@setting
def tabular_classes(**kwargs):
    df = load_wine(as_frame=True).frame
    df['strong'] = np.where(df.alcohol>13, 'yes', 'no')
    columns = dict(cat_names=['strong'], cont_names=list(df.columns[1:8]), y_names='target',
                   y_block=tabular.CategoryBlock())
    dls = tabular.TabularDataLoaders.from_df(df, procs=[tabular.Categorify, tabular.Normalize], **columns,
                                             valid_idx=list(range(0, 178, 5)), bs=32, num_workers=0)
    return tabular.tabular_learner(dls, layers=[20], metrics=tabular.accuracy, **kwargs)

@setting
def ratings(**kwargs):
    "Collaborative filtering"
    rng = np.random.default_rng(42)
    user,film = rng.integers(0, 20, 320),rng.integers(0, 15, 320)
    df = pd.DataFrame(dict(user=user, film=film, rating=1.+(user%3+film%3)))
    dls = collab.CollabDataLoaders.from_df(df, bs=32, seed=42, num_workers=0)
    return collab.collab_learner(dls, n_factors=8, y_range=(.5,5.5), metrics=tabular.mae, **kwargs)

def _texts():
    ws = words(1600)
    pieces = [' '.join(ws[i:i+40]) for i in range(0, len(ws), 40)]
    return pd.DataFrame(dict(text=pieces, label=['long' if 'class' in o else 'short' for o in pieces]))

_awd = dict(emb_sz=16, n_hid=16, n_layers=1)

def _text_loaders(*more_blocks, **kwargs):
    "Words are what stands between spaces; tokenized in this process, which is fastest for a few texts"
    column = text.TextBlock.from_df('text', seq_len=16, tok=text.BaseTokenizer(), n_workers=0, **kwargs)
    readers = [text.ColReader('text'), text.ColReader('label')][:1+len(more_blocks)]
    block = text.DataBlock((column, *more_blocks), getters=readers, splitter=text.RandomSplitter(seed=42))
    return block.dataloaders(_texts(), bs=8, seq_len=16, num_workers=0)

@setting
def language_model(**kwargs):
    config = text.awd_lstm_lm_config | _awd
    return text.language_model_learner(_text_loaders(is_lm=True), text.AWD_LSTM, config=config,
                                       pretrained=False, metrics=text.Perplexity(), **kwargs)

@setting
def text_classifier(**kwargs):
    config = text.awd_lstm_clas_config | _awd
    return text.text_classifier_learner(_text_loaders(text.CategoryBlock), text.AWD_LSTM, config=config,
                                        pretrained=False, seq_len=16, metrics=text.accuracy, **kwargs)

@setting
def torch_loader(**kwargs):
    "PyTorch's own loader, which moves no batch to the device: fastai does"
    g = torch.Generator().manual_seed(42)
    x = torch.randn(160, 5, generator=g)
    items = torch.utils.data.TensorDataset(x, (x.sum(1)>0).long())
    train,valid = torch.utils.data.random_split(items, [128, 32], generator=g)
    loader = torch.utils.data.DataLoader
    dls = vision.DataLoaders(loader(train, 16, shuffle=True), loader(valid, 16))
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    return vision.Learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=vision.accuracy, **kwargs)

@setting
def list_of_batches(**kwargs):
    "A loader that is a list: no device, no batch size, no hash"
    g = torch.Generator().manual_seed(42)
    x = torch.randn(160, 5, generator=g)
    batches = list(zip(x.split(16), (x.sum(1)>0).long().split(16)))
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    return vision.Learner(vision.DataLoaders(batches[:8], batches[8:]), model, metrics=vision.accuracy,
                          loss_func=nn.CrossEntropyLoss(), **kwargs)

@setting
def gan(**kwargs):
    "A GAN, whose generator and critic take turns"
    normalize = vision.Normalize.from_stats([.5]*3, [.5]*3)
    block = vision.DataBlock((vision.TransformBlock, vision.ImageBlock), get_items=vision.get_image_files,
                             get_x=_noise, splitter=vision.IndexSplitter([]), batch_tfms=normalize)
    return gans.GANLearner.wgan(_loaders(block), gans.basic_generator(16, 3, in_sz=8, n_features=8),
                                gans.basic_critic(16, 3, n_features=8), **kwargs)

def _noise(path): return gans.InvisibleTensor(torch.randn(8))
