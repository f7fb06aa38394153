"""K-fold cross-validation as on Kaggle: checkpoints for each fold, one score

    python examples/recipes/kfold.py --path runs/kfold --folds 5

Killed and started again, it does not train the folds again that are done."""
from fastai.tabular.all import *
from fastai_callbacks_ext.all import *
from sklearn.datasets import load_diabetes
from sklearn.model_selection import KFold

def fold_learner(df, valid):
    dls = TabularDataLoaders.from_df(df, procs=Normalize, cont_names=[*df.columns[:-1]],
        y_names='target', y_block=RegressionBlock(), valid_idx=[*valid], bs=64)
    return tabular_learner(dls, layers=[100,50], metrics=rmse, y_range=(0,380))

def score(preds, targs): return np.sqrt(np.mean((preds-targs)**2))

@call_parse
def main(
    path:Path='runs/kfold', # Folder for the folds and the predictions
    folds:int=3, # Into how many parts to cut the data
    epochs:int=5, # For each fold
):
    df = load_diabetes(as_frame=True).frame.astype('float32')
    oof = np.zeros(len(df))     # out of fold: by the model that has not seen the row
    splits = KFold(folds, shuffle=True, random_state=42).split(df)
    for i,(_,valid) in enumerate(splits):
        set_seed(i)
        learn = fold_learner(df, valid)
        learn.fit_one_cycle(epochs, 2e-2, cbs=Checkpoint(path/f'fold_{i}'))
        oof[valid] = learn.get_preds()[0].squeeze().numpy()
        print(f'fold {i}: RMSE {score(oof[valid], df.target[valid]):.2f}')
    np.save(path/'oof.npy', oof)
    print(f'out of fold: RMSE {score(oof, df.target):.2f}')
