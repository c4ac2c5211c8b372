from vim_timm.train import main

raise SystemExit(main())
