from vim_timm.commands import main

if __name__ == '__main__':
    raise SystemExit(main('train'))
