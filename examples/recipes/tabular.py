"""Regression on a table: stop when the RMSE stops falling, and keep the best weights

    python examples/recipes/tabular.py --path runs/tabular
    python examples/recipes/tabular.py --csv my/table.csv --target price"""
from fastai.tabular.all import *
from fastai_callbacks_ext.all import *
from sklearn.datasets import load_diabetes

@call_parse
def main(
    path:Path='runs/tabular', # Folder for the model
    csv:Path=None, # A table; without it, scikit-learn's diabetes
    target:str='target', # The column to predict: numbers
    epochs:int=50, # At most
):
    set_seed(42)
    df = pd.read_csv(csv) if csv else load_diabetes(as_frame=True).frame
    df[target] = df[target].astype('float32')
    cont,cat = cont_cat_split(df, dep_var=target)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize],
        cat_names=cat, cont_names=cont, y_names=target, y_block=RegressionBlock(),
        valid_idx=RandomSplitter(seed=42)(df)[1], bs=64)
    path.mkdir(parents=True, exist_ok=True)
    learn = tabular_learner(dls, layers=[100,50], metrics=rmse, path=path,
                            y_range=(0, 1.1*df[target].max()))
    # fastai's metric `rmse` has the name `_rmse` in the table
    learn.fit(epochs, 5e-3, cbs=EarlyStopping('_rmse', patience=5, restore_best=True))
    print(f'RMSE of the best epoch: {learn.validate()[1]:.2f}')
    learn.export('model.pkl')
